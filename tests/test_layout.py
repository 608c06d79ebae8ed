"""The shape of the repository: which file may import what, how much there is to read, what lies where.

Every rule is a function from sources to a list of violations. Each is tested twice: on this repository, and on a
planted violation that it has to find.
"""

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minilora"

# The order in which the source is read: a file imports only what stands above it, or its own package.
LAYERS = (
    "errors backend execution memory tensor differences comparison gradcheck ops kernels nn inputs models lora optim "
    "files terminal formats data recording step train generate plan report model loading demo cli __main__"
).split()
ENGINE = LAYERS[: LAYERS.index("optim") + 1]
NEAR_THE_MACHINE = ("backend", "kernels")  # where array libraries, their dtypes and thread pools are dealt with
READING_PATH = ("backend", "tensor", "ops", "nn", "models", "lora", "optim")
# Files of models/ that hold a second, third ... family: a reader needs one.
OTHER_FAMILIES = ("models/gpt2.py", "models/mistral.py", "models/qwen2.py", "models/qwen3.py")
# What is read when it is wanted, each in a file: variants of LoRA, what else adapters can do, config.json, generation.
WHEN_WANTED = (
    *("lora/variants/", "ops/dora.py", "lora/combine.py", "lora/own.py", "lora/statistics.py"),
    *("lora/rows.py", "lora/requantise.py", "lora/values.py", "models/config_file.py", "models/cache.py"),
)
FASTER_ONLY = ("ops/fused.py", "models/together.py", "models/decoding.py")  # the same as other files of the path
LINES_OF_THE_READING_PATH = 2_350  # not counting blank lines, imports and __init__ files; of them a third is docstrings
SECONDS_TO_IMPORT = 0.3  # beyond what NumPy itself takes

TOP_LEVEL = set("pyproject.toml README.md LICENSE .gitignore .ci minilora tests examples docs".split())
REGISTRY_HOSTS = ("pypi" + ".org", "python" + "hosted.org", "npmjs" + ".org", "debian" + ".org", "crates" + ".io")

SOURCES = {str(path.relative_to(PACKAGE)): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(path: str) -> str:
    """ "ops" of ops/norm.py, "nn" of nn.py, "" of the package's own __init__.py."""
    first = path.split("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(path: str, source: str) -> Iterator[tuple[str, str]]:
    """(package, layer) of every import in minilora/`path`, inside functions too: ("numpy", ""), ("minilora", "ops").

    What stands under `if TYPE_CHECKING:` names types for annotations and is not imported.
    """
    package = ["minilora", *path.split("/")[:-1]]
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            yield top, rest[0] if top == "minilora" and rest else ""


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a syntax tree, less what only a type checker sees."""
    yield node
    for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    for child in node.orelse if for_types else ast.iter_child_nodes(node):
        yield from executed(child)


def out_of_order(sources: dict[str, str]) -> list[str]:
    found = []
    for path, source in sources.items():
        layer = layer_of(path)
        if not layer:
            continue  # __init__.py gathers the public names
        if layer not in LAYERS:
            found.append(f"{path}: {layer} has no place in the reading order")
            continue
        for package, target in imports(path, source):
            if package == "minilora" and target != layer and target not in LAYERS[: LAYERS.index(layer)]:
                found.append(f"{path} imports {target or 'the package itself'}, which does not stand above {layer}")
    return found


def foreign_to_the_engine(sources: dict[str, str]) -> list[str]:
    found = []
    for path, source in sources.items():
        layer = layer_of(path)
        allowed = {"minilora", "numpy", *sys.stdlib_module_names}
        if layer in NEAR_THE_MACHINE:
            allowed |= {"cupy", "cupyx", "cupy_backends", "ml_dtypes", "threadpoolctl"}
        found += [
            f"{path} imports {package}"
            for package, _ in imports(path, source)
            if (layer in ENGINE and package not in allowed)
            or (layer not in NEAR_THE_MACHINE and package.startswith("cupy"))
            or package in ("torch", "jax", "tensorflow")
        ]
    return found


def lines_to_read(sources: dict[str, str]) -> dict[str, int]:
    """{file: lines that are neither blank nor part of an import} of the reading path; an __init__ only lists names."""
    found = {}
    for path, source in sources.items():
        aside = path.startswith(OTHER_FAMILIES + WHEN_WANTED + FASTER_ONLY) or path.endswith("__init__.py")
        if layer_of(path) in READING_PATH and not aside:
            imported = {
                number
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
            }
            lines = enumerate(source.splitlines(), start=1)
            found[path] = sum(bool(line.strip()) and number not in imported for number, line in lines)
    return found


def tied_to_a_place(files: dict[str, str]) -> list[str]:
    """Files that name a folder of somebody's machine, or the host of a package registry."""
    pattern = re.compile(r"(?<![\w.~])/(work|root|opt)/|" + "|".join(map(re.escape, REGISTRY_HOSTS)))
    return [f"{path} has {match[0]}" for path, text in files.items() if (match := pattern.search(text))]


def outside_the_layout(paths: list[str]) -> set[str]:
    return {path.split("/")[0] for path in paths} - TOP_LEVEL


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split("\0") if path and (ROOT / path).exists()]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- imports


def test_every_file_imports_only_what_stands_above_it():
    assert not out_of_order(SOURCES)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/norm.py", "from ..kernels import cpu"),
        ("ops/norm.py", "def f():\n    from .. import kernels"),
        ("backend.py", "from .tensor import Tensor"),
        ("backend.py", "import minilora.model"),
        ("lora/merge.py", "from minilora.formats.peft import save"),
        ("nn.py", "import minilora"),
        ("step.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from .train import loop"),
        ("stray.py", ""),
    ],
)
def test_an_import_from_below_is_found(path, source):
    assert len(out_of_order({path: source})) == 1


def test_imports_from_above_and_within_a_package_are_allowed():
    fine = {
        "ops/norm.py": "from ..tensor import Tensor\nfrom .linalg import rows\nfrom . import shape",
        "cli.py": "from . import model",
        "train/table.py": "if TYPE_CHECKING:\n    from ..model import Model",
    }
    assert not out_of_order(fine)


def test_the_engine_needs_numpy_alone_and_nothing_needs_torch():
    assert not foreign_to_the_engine(SOURCES)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nn.py", "import scipy.special"),
        ("lora/merge.py", "from ml_dtypes import bfloat16"),
        ("ops/norm.py", "import cupy"),
        ("formats/peft.py", "def f():\n    import torch.nn"),
        ("train.py", "from cupyx import jit"),
        ("cli.py", "import jax.numpy as jnp"),
    ],
)
def test_a_foreign_import_is_found(path, source):
    assert len(foreign_to_the_engine({path: source})) == 1


def test_array_libraries_are_allowed_near_the_machine_and_others_outside_the_engine():
    fine = {"backend.py": "import cupy, ml_dtypes", "kernels/cpu.py": "import threadpoolctl", "cli.py": "import typer"}
    assert not foreign_to_the_engine(fine)


ONLY_NUMPY = """
import importlib.abc, sys

class OnlyNumpy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {"minilora", "numpy"} and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, OnlyNumpy())
"""

TRAIN_ON_ARRAYS = """
import numpy as np
import minilora as ml

random = np.random.default_rng(0)
x, W, target = random.normal(size=(16, 6)), random.normal(size=(5, 6)), random.normal(size=(16, 5))
A, B = ml.Tensor(random.normal(size=(2, 6)), requires_grad=True), ml.Tensor(np.zeros((5, 2)), requires_grad=True)

def loss():
    return ((ml.ops.lora_linear(x, W, None, A, B, scale=2.0) - target) ** 2).mean()

optimizer = ml.AdamW([A, B], lr=0.05)
losses = []
for _ in range(50):
    value = loss()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    losses.append(float(value))
assert losses[-1] < 0.8 * losses[0], losses
ml.gradcheck(lambda A, B: ml.ops.lora_linear(x, W, None, A, B, scale=2.0), [A.data, B.data])
print("trained and checked")
"""


def test_training_on_arrays_and_gradcheck_work_with_numpy_alone_installed():
    assert run_python(ONLY_NUMPY + TRAIN_ON_ARRAYS) == "trained and checked\n"


def test_the_import_hook_does_block_what_is_not_numpy():
    attempt = "try:\n    import pytest\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert run_python(ONLY_NUMPY + attempt) == "pytest\n"


def test_importing_minilora_takes_under_a_third_of_a_second_beyond_numpy():
    """Processor time, so that other programs' work is not counted; nor is the first run, which may compile."""
    code = "import numpy, time; t = time.process_time(); import minilora; print(time.process_time() - t)"
    seconds = [float(run_python(code)) for _ in range(6)][1:]
    assert statistics.median(seconds) < SECONDS_TO_IMPORT, seconds


# ---------------------------------------------------------------- dependencies


def test_docs_say_of_every_dependency_where_it_is_imported():
    """Of each package: the files that the table names (a folder stands for any file in it) are those that import it."""
    importing: dict[str, set[str]] = {}
    for path, source in SOURCES.items():
        for package, _ in imports(path, source):
            importing.setdefault(package, set()).add(path)
    assert documented().keys() == declared()
    for package, places in documented().items():
        files = importing.get(package.partition("-")[0], set())
        if places != {"everywhere"}:
            assert {place for place in places for file in files if file.startswith(place)} == places, (package, files)
            assert {file for place in places for file in files if file.startswith(place)} == files, (package, files)


def test_nothing_is_imported_that_is_not_declared():
    standard = {"minilora", *sys.stdlib_module_names}
    imported = {package for path, source in SOURCES.items() for package, _ in imports(path, source)} - standard
    assert imported - {"cupyx", "cupy_backends"} <= {name.partition("-")[0] for name in declared()}


def declared() -> set[str]:
    """The packages in pyproject.toml that minilora/ itself imports: the default dependencies and users' extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = sum((extras[extra] for extra in ("cuda12", "cuda13", "plot", "hub")), project["dependencies"])
    return {re.split("[<>=!~[ ]", requirement)[0] for requirement in requirements}


def documented() -> dict[str, set[str]]:
    """{package: places in the column "imported in"} of the tables in docs/dependencies.md."""
    rows = re.findall(r"^\|(.+)\|$", (ROOT / "docs" / "dependencies.md").read_text("utf-8"), re.M)
    found = {}
    for row in rows:
        cells = row.split("|")
        places = set(re.findall("`([^`]+)`", cells[-1])) or {cells[-1].strip()}
        if places & {"", "---", "imported in"}:
            continue
        for package in re.findall("`([^`]+)`", cells[1] if len(cells) == 5 else cells[0]):
            found[package] = places
    return found


# ---------------------------------------------------------------- what there is to read


def test_the_reading_path_can_be_read_in_an_afternoon():
    lines = lines_to_read(SOURCES)
    assert sum(lines.values()) <= LINES_OF_THE_READING_PATH, f"{sum(lines.values())} lines: {lines}"
    assert {layer_of(path) for path in lines} == set(READING_PATH)


def test_readers_are_sent_to_the_files_that_are_counted_and_to_no_other():
    """The first table of docs/reading_order.md: what is counted, and before it errors and the gradient checks."""
    page = (ROOT / "docs" / "reading_order.md").read_text("utf-8")
    engine = page[page.index("## The engine") : page.index("## What is beside it")]
    named = set(re.findall(r"\]\(\.\./minilora/([\w/.]+)\)", engine))
    besides = {"errors.py", "differences.py", "comparison.py", "gradcheck.py"}
    assert named - besides == lines_to_read(SOURCES).keys()


def test_the_count_leaves_out_blank_lines_imports_and_what_is_off_the_path():
    sources = {"nn.py": "from a import (\n    b,\n)\n\n  \nb\nc\n", "kernels/cpu.py": "c\n", "ops/norm.py": "d"}
    assert lines_to_read(sources) == {"nn.py": 2, "ops/norm.py": 1}


# ---------------------------------------------------------------- what lies where


def test_the_top_level_holds_only_what_the_layout_names(tracked):
    assert not outside_the_layout(tracked)


def test_a_stray_file_at_the_top_is_found():
    assert outside_the_layout(["setup.cfg", "minilora/nn.py", "scripts/x.sh"]) == {"setup.cfg", "scripts"}


def test_no_file_names_a_folder_of_a_machine_or_a_registry_host(tracked):
    texts = {path: (ROOT / path).read_bytes().decode("utf-8", "replace") for path in tracked}
    assert not tied_to_a_place(texts)


@pytest.mark.parametrize("text", ["open('/" + "work/main/x')", "cd /" + "opt/venv", "see https://" + REGISTRY_HOSTS[0]])
def test_a_machine_path_or_registry_host_is_found(text):
    assert tied_to_a_place({"docs/guide.md": text})


def test_relative_paths_that_look_alike_are_not_taken_for_machine_paths():
    assert not tied_to_a_place({"a.md": "runs/work/x ~/work/x ./opt/y https://example.com"})
