"""The book against the code: its error messages exist, its API page is complete, its order is the code's; it builds."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys

import pytest

import minilora as ml
from tests.docs.pages import BY_NAME, ROOT
from tests.test_layout import LAYERS, layer_of

PACKAGE = ROOT / "minilora"
LEAST_MESSAGES = 25


def templates() -> set[str]:
    """Every text in the source, with … for what is put into it."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.add("".join(map(str, parts)))
    return found


def quoted(text: str) -> list[str]:
    """The error messages that head the entries of the page on troubleshooting."""
    return re.findall(r"^### `(.+)`$", text, re.M)


def not_in_the_source(messages: list[str]) -> list[str]:
    known = templates()
    return [message for message in messages if not any(message in template for template in known)]


def test_every_error_message_that_is_explained_is_one_of_the_source():
    messages = quoted(BY_NAME["docs/troubleshooting.md"].read_text("utf-8"))
    assert len(messages) >= LEAST_MESSAGES
    assert len(set(messages)) == len(messages)
    assert not not_in_the_source(messages)


def test_a_message_that_nothing_prints_is_noticed():
    assert not_in_the_source(["LoraConfig.… is …, expected …", "the moon is …"]) == ["the moon is …"]


def test_the_api_page_has_every_public_name_once():
    named = re.findall(r"^::: minilora\.(\w+)$", BY_NAME["docs/api.md"].read_text("utf-8"), re.M)
    assert sorted(named) == sorted(set(ml.__all__) - {"ops"})


def test_the_reading_order_is_the_order_of_imports():
    text = BY_NAME["docs/reading_order.md"].read_text("utf-8")
    engine = text[: text.index("## What is beside it")]
    layers = [layer_of(path) for path in re.findall(r"\(\.\./minilora/([\w/]+\.py)\)", engine)]
    assert layers == sorted(layers, key=LAYERS.index)
    assert {"backend", "tensor", "ops", "nn", "models", "lora", "optim"} <= set(layers)


def test_every_link_within_the_repository_leads_somewhere():
    for page, path in BY_NAME.items():
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.S)
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
            if not re.match(r"[a-z]+:", link):
                assert (path.parent / link).exists(), f"{page} links to {link}"


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml")),
    reason="the site's builder is not installed (pip install 'minilora[docs]')",
)
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = ["build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "book" / "primitives" / "norms.html").read_text("utf-8")
    assert "<math" in page
    for path in tmp_path.rglob("*.html"):
        text = path.read_text("utf-8")
        assert "arithmatex" not in text
        prose = re.sub(r"<(code|pre)[ >].*?</\1>", "", text, flags=re.S)
        assert "$$" not in prose, f"{path.name} has a formula that was not taken for one"
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]+?(?:src|href)="(https?://[^"]+)', text)
        assert not loaded, f"{path.name} loads {loaded[0]}"
