"""What the book takes from the source and from measurements is there as it is now: `docs/site/fill.py` writes it."""

import importlib.util
import re
from pathlib import Path

import pytest

from minilora.tensor import PRIMITIVES
from tests.docs.pages import ROOT

SCRIPT = ROOT / "docs" / "site" / "fill.py"
PAGES = ROOT / "docs" / "book"
GENERAL = ("arithmetic", "shape")  # files of primitives that docs/gradients.md is enough for
GENERAL_TOO = ("matmul", "silu")


@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("fill", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_marked_parts_are_up_to_date(fill):
    assert fill.pages()
    for page in fill.pages():
        text = page.read_text("utf-8")
        assert text == fill.filled(text, page), f"{page.name} is out of date: run python docs/site/fill.py"


def test_every_fused_primitive_has_its_code_and_its_check_in_the_book():
    text = "".join(path.read_text("utf-8") for path in sorted(PAGES.rglob("*.md")))
    shown = set(re.findall(r"<!-- filled: code \S+ (\w+) -->", text))
    checked = {name for names in re.findall(r"<!-- filled: checked ([\w ]+?) -->", text) for name in names.split()}
    fused = {
        name
        for name, primitive in PRIMITIVES.items()
        if primitive.__module__.startswith("minilora.ops")
        and primitive.__module__.rpartition(".")[2] not in GENERAL
        and name not in GENERAL_TOO
    }
    assert fused <= shown, fused - shown
    assert fused <= checked, fused - checked


def test_a_page_that_lags_behind_is_noticed(fill):
    page = ROOT / "docs" / "book" / "page.md"
    right = fill.filled("<!-- filled: code ops/linalg.py linear -->\n<!-- end -->", page)
    assert "times_transposed(rows(x), weight)" in right
    assert '"""' not in right
    assert fill.filled(right, page) == right
    assert fill.filled(right.replace("dy = rows(dy)", "dy = dy"), page) == right


def test_kernels_are_found_with_their_device(fill):
    found = fill.kernels()
    assert ("kernels/cpu/linear.py", "cpu") in found["lora_linear"]
    assert ("kernels/cuda/linear.py", "cuda") in found["lora_linear"]
    for name in found:
        assert name in PRIMITIVES
    assert Path(SCRIPT).exists()
