"""The page of each claim, and the list of all with their verdicts, rendered from the JSON files that measuring left."""

from __future__ import annotations

import importlib
import inspect
import os
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

from minilora.files import atomic_write, read_json_object

from . import NAMES

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "claims"
INTRODUCTION = """# The claims, measured

What the paper of LoRA says (Hu et al. 2021, "LoRA: low-rank adaptation of large language models"), each claim as an
experiment on `mini`, the model that comes with minilora, and some on SmolLM2, too. Each file here states the claim, how
it is measured and what would refute it, before anything is measured; the verdict is that rule, applied to the numbers.
On so small a model a claim about large ones may fail: then it says so. Where another order of the rows or another start
of the adapter changes the numbers, several seeds are run on `mini`; on SmolLM2 one, where it is measured at all. Each
takes up to six minutes of an idle core. The pages say the sizes.

    python -m examples.claims rank_sweep                  # one of them: docs/claims/rank_sweep.json, .png and .md
    python -m examples.claims all
    python -m examples.claims memory --model smollm2      # so are latency, swapping, subspaces, intrinsic_rank: minutes
    python -m examples.claims all --model smollm2 --device cuda           # the rest needs a GPU, minutes each
    python -m examples.claims all --no-figures            # numbers only, where matplotlib is missing
    python -m examples.claims --render                    # figures and pages again, from the numbers that are there
"""
MINI_ONLY = """Measured on `mini` only: on SmolLM2 the trainings of this page take between half an hour
and several hours on a CPU. A GPU does them with

    python -m examples.claims {name} --model smollm2 --device cuda"""


def claim(name: str) -> ModuleType:
    """The module of a claim."""
    return importlib.import_module(f".{name}", __package__)


def stem(name: str, model: str, device: str) -> str:
    """What the files of a claim measured on that model are called, before the dot."""
    return name + ("" if model == "mini" else f"-{Path(model).name}") + ("" if device == "cpu" else "-gpu")


def measured(name: str, folder: Path) -> list[dict[str, Any]]:
    """What was measured of a claim, the embedded model first."""
    files = [folder / f"{name}.json", *sorted(folder.glob(f"{name}-*.json"))]
    return [read_json_object(file) for file in files if file.exists()]


def title_and_text(module: ModuleType) -> tuple[str, str]:
    """The docstring's first line, and its paragraphs, each one with its first word in bold."""
    title, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    paragraphs = []
    for paragraph in rest.split("\n\n"):
        word, _, text = " ".join(paragraph.split()).partition(". ")
        paragraphs.append("\n".join(textwrap.wrap(f"**{word}.** {text}", 120)))
    return title, "\n\n".join(paragraphs)


def page(name: str, folder: Path) -> str:
    """The claim's page as Markdown: what the docstring says; for each model verdict, figure, numbers and command."""
    module = claim(name)
    title, text = title_and_text(module)
    parts = [f"# {title}", text]
    for found in measured(name, folder):
        results, model = found["results"], found["model"]
        verdict = module.verdict(results)
        device = found["device"]
        option = ("" if model == "mini" else f" --model {model}") + ("" if device == "cpu" else f" --device {device}")
        parts += [
            f"## On {model}" + ("" if device == "cpu" else ", on a GPU"),
            f"**Verdict: it {verdict.word}.** {verdict.why[0].upper()}{verdict.why[1:]}.",
            *([] if verdict.holds else [explained] if (explained := explanation(module, model)) else []),
            f"![{title}: the numbers below as a figure]({stem(name, model, device)}.png)",
            module.rows(results),
            f"Measured with {sizes_in_words(found['sizes'])}, by",
            f"    python -m examples.claims {name}{option}",
        ]
    if all(found["model"] == "mini" for found in measured(name, folder)):
        parts.append(MINI_ONLY.format(name=name))
    return "\n\n".join(parts) + "\n"


def sizes_in_words(sizes: dict[str, Any]) -> str:
    """`ranks 1, 8; steps 120; batch size 16; seeds 3`."""
    return "; ".join(
        f"{name.replace('_', ' ')} {', '.join(f'{one:g}' for one in (value if isinstance(value, list) else [value]))}"
        for name, value in sizes.items()
    )


def explanation(module: ModuleType, model: str) -> str:
    """Why the claim may not hold on that model, where its module has thought of it (WHY_NOT)."""
    return "\n".join(textwrap.wrap(getattr(module, "WHY_NOT", {}).get(model, ""), 120))


def index(folder: Path, place: Path) -> str:
    """The list of all claims that were measured, as the file `place` holds it."""
    lines = ["| claim | verdict | why |", "| --- | --- | --- |"]
    for name in NAMES:
        for found in measured(name, folder):
            module = claim(name)
            verdict = module.verdict(found["results"])
            link = os.path.relpath(folder / f"{name}.md", place.parent)
            where = "" if found["model"] == "mini" else f" ({found['model']})"
            lines.append(f"| [{title_and_text(module)[0]}]({link}){where} | {verdict.word} | {verdict.why} |")
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def write_pages(folder: Path) -> None:
    """All pages in the folder and the list of them; with the pages of docs/ the list stands in README.md here, too."""
    for name in NAMES:
        if measured(name, folder):
            atomic_write(folder / f"{name}.md", page(name, folder).encode())
    for place in [folder / "index.md", *([HERE / "README.md"] if folder.resolve() == DOCS else [])]:
        atomic_write(place, index(folder, place).encode())
