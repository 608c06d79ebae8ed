"""The code in the README and in docs/ runs, and prints what the page says.

A page's blocks are run from top to bottom in one folder and, for Python, one namespace. What stands in a `text` block
right behind a Python block is what it has to print. So that it takes seconds, the code runs in a small world:

- `smollm2` is a tiny random Llama that reads bytes, in a folder of that name;
- `examples/dates` has a few of its rows; `rows.jsonl` and the adapters `runs/law` and `runs/code` are there;
- `--steps N` and `steps=N` take two steps; all other options stay as they are;
- lines that install things are left out: the tests run in what they would make.

A block that cannot be run here stands behind a comment `<!-- not run: the reason -->`. Pages that another test runs
are named in ELSEWHERE.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import minilora as ml
from minilora.cli import app
from minilora.lora.variants import VARIANTS
from minilora.models import FAMILIES
from minilora.tensor import PRIMITIVES
from tests import texts, tiny
from tests.docs.pages import BY_NAME, ROOT, Block, all_blocks, blocks

RUN = {"python", "bash"}
SHOWN = {"text", "json", "toml", "modelfile", "cuda"}  # data, output and other programs' files
ELSEWHERE = {  # (page, language) -> the test that runs it
    ("docs/extend.md", "python"): "tests/lora/test_extend.py",
    ("docs/guides/llama_cpp.md", "sh"): "tests/parity/test_guides.py",
    ("docs/guides/mlx.md", "sh"): "tests/parity/test_guides.py",
    ("docs/guides/ollama.md", "sh"): "tests/parity/test_guides.py",
    ("docs/guides/vllm.md", "sh"): "tests/parity/test_guides.py",
}
NEEDED = {"docs/guides/peft.md": ("torch", "transformers", "peft")}  # packages of the extra `parity`
INSTALLING = ("python3 -m venv", ". .venv", "pip install", "python -m pytest")
NEEDS_A_SHELL = re.compile(r"[|<>$;&]|^\s*(?!minilora )\w", re.M)
LOOP = re.compile(r"^for (\w+) in ([^;]+); do\n(.*?)^done$", re.M | re.S)
ESCAPED = re.compile(r"\$'((?:[^'\\]|\\.)*)'")  # $'a\n' as bash reads it
HIDDEN = re.compile(r"^ {4}(?:minilora \w+ .*|import \w+.*|model\.\w+\(.*|python (?!-m (?:tests|examples)\b).*)$", re.M)
SECONDS = 120
ROWS = 12  # of examples/dates

BLOCKS = all_blocks()
RUNNABLE = [block for block in BLOCKS if block.language in RUN and not block.not_run]
RUNNABLE = [block for block in RUNNABLE if (block.page, block.language) not in ELSEWHERE]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every page starts in a copy of."""
    folder = tmp_path_factory.mktemp("world")
    model = texts.model()
    model.network.lm_head.weight.data[[*range(32), *range(127, texts.VOCABULARY)]] = 0  # it writes printable text
    for number, name in enumerate(("law", "code")):
        tiny.add_random_adapter(model, name, ml.LoraConfig(r=3, alpha=6), seed=number)
        model.save_adapter(name, folder / "runs" / name)
        model.delete_adapter(name)
    model.save(folder / "smollm2")
    (folder / "docs").mkdir()  # where a page's command draws its picture
    (folder / "examples" / "dates").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        rows = (ROOT / "examples" / "dates" / f"{split}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / "examples" / "dates" / f"{split}.jsonl").write_text("".join(rows[:ROWS]), "utf-8")
    rows = [{"prompt": f"What is {n} + {n}?\n", "completion": str(2 * n)} for n in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the world to work in; what a page registers is forgotten afterwards."""
    copy = shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(copy)
    registries = [(registry, dict(registry)) for registry in (PRIMITIVES, VARIANTS, FAMILIES)]
    yield copy
    for registry, before in registries:
        registry.clear()
        registry.update(before)


def in_this_world(text: str) -> str:
    text = re.sub(r"(?<![\w./-])smollm2\b", "./smollm2", text)
    text = re.sub(r"(--steps[ =])\d+", r"\g<1>2", text)
    return re.sub(r"\bsteps=\d+", "steps=2", text)


def run_python(block: Block, namespace: dict[str, object]) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(in_this_world(block.text), str(block), "exec"), namespace)
    if block.printed is not None:
        assert printed.getvalue() == block.printed, f"{block} prints something else than the page says"


def unescaped(quoted: re.Match[str]) -> str:
    return shlex.quote(quoted[1].encode().decode("unicode_escape"))


def commands(text: str) -> list[str]:
    """The lines of a shell block, joined where they end in a backslash, loops written out; none that installs."""
    text = re.sub(r"\\\n\s*", "", text)
    text = LOOP.sub(lambda loop: "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()), text)
    lines = [ESCAPED.sub(unescaped, line.strip()) for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith((*INSTALLING, "#"))]


def run_shell(block: Block, folder: Path) -> None:
    """Plain lines `minilora ...` in this process; a block with anything else in bash."""
    lines = commands(in_this_world(block.text))
    if not NEEDS_A_SHELL.search("\n".join(re.sub(r"'[^']*'|\"[^\"]*\"", "''", line) for line in lines)):
        for line in lines:
            program, *arguments = shlex.split(line, comments=True)
            assert program == "minilora", f"{block}: {line}"
            result = CliRunner().invoke(app, arguments)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            assert result.exit_code == 0, f"{block}: {line}\n{result.stderr}"
        return
    script = f'set -eu\nminilora() {{ {shlex.quote(sys.executable)} -m minilora "$@"; }}\n'
    script += f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n' + "\n".join(lines)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", sorted({block.page for block in RUNNABLE}))
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page, folder):
    for package in NEEDED.get(page, ()):
        pytest.importorskip(package, reason="the page is about PEFT (pip install 'minilora[parity]')")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in (block for block in RUNNABLE if block.page == page):
        if block.language == "python":
            run_python(block, namespace)
        else:
            run_shell(block, folder)


def test_every_block_is_run_or_shown_or_says_why_it_is_not_run():
    for block in BLOCKS:
        known = block.language in RUN | SHOWN or (block.page, block.language) in ELSEWHERE
        assert known, f"{block}: a block of language {block.language!r}, expected one of {sorted(RUN | SHOWN)}"
    for page, language in ELSEWHERE:
        assert any(block.page == page and block.language == language for block in BLOCKS), page


def test_few_blocks_are_not_run():
    left_out = [f"{block}: {block.not_run}" for block in BLOCKS if block.not_run]
    assert len(left_out) <= 6, "\n".join(left_out)
    assert all(block.language in RUN for block in BLOCKS if block.not_run)


def test_no_command_or_python_hides_in_an_indented_block():
    """An indented block is not run, so it holds formulas, layouts, and what measures for minutes."""
    for page, path in BY_NAME.items():
        text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)
        found = HIDDEN.findall(text)
        assert not found, f"{page}: {found[0].strip()}: put it into a fenced block"


def test_a_block_that_prints_something_else_is_noticed():
    (block,) = blocks("page", "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")[:1]
    with pytest.raises(AssertionError, match="something else"):
        run_python(block, {})


def test_a_command_that_fails_is_noticed(folder):
    for text in ("minilora inspect nowhere\n", "minilora inspect nowhere | cat\nfalse\n"):
        (block,) = blocks("page", f"```bash\n{text}```\n")
        with pytest.raises(AssertionError, match="page:1"):
            run_shell(block, folder)


def test_a_reason_belongs_to_the_block_behind_it():
    first, second = blocks("page", "<!-- not run: no GPU -->\n```bash\na\n```\n\n```bash\nb\n```\n")
    assert (first.not_run, second.not_run) == ("no GPU", None)
