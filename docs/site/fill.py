"""python docs/site/fill.py: write again what pages of the book take from the source and from measurements.

What stands between `<!-- filled: KIND ARGUMENTS -->` and `<!-- end -->` in a page is written by this script:

    code FILE NAME          the function or class of minilora/FILE, less its docstring (the page has the derivation)
    commands                the commands of `minilora`, each with the first sentence of its help
    checked NAME ...        of these primitives: the worst errors that docs/gradients.json records, and their kernels

tests/docs/test_filled.py fails where a page is out of date.
"""

from __future__ import annotations

import ast
import json
import os
import re
import textwrap
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent
PACKAGE = DOCS.parent / "minilora"
MARKED = re.compile(r"<!-- filled: (\w+)([^>]*?) -->\n.*?<!-- end -->", re.S)
KERNEL = re.compile(r"^@ops\.(\w+)\.kernel\(\"(cpu|cuda)\"", re.M)


def filled(text: str, page: Path) -> str:
    """The page's text with its marked parts as they are to be."""

    def part(match: re.Match[str]) -> str:
        kind, arguments = match[1], match[2].split()
        content = {"code": code, "checked": checked, "commands": commands}[kind](page, *arguments)
        return f"<!-- filled: {kind}{match[2]} -->\n{content}\n<!-- end -->"

    return MARKED.sub(part, text)


def code(page: Path, file: str, name: str) -> str:
    """The source of a function or class as a block, with a link to its file."""
    source = (PACKAGE / file).read_text("utf-8")
    node = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    lines = source.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    shown = lines[first - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        assert docstring.end_lineno is not None
        del shown[docstring.lineno - first : docstring.end_lineno + 1 - first]
    body = textwrap.dedent("\n".join(line for line in shown)).strip("\n")
    return f"[minilora/{file}]({link(page, PACKAGE / file)}), `{name}`:\n\n```python\n{body}\n```"


def checked(page: Path, *names: str) -> str:
    """A row for each primitive: its errors against composition and finite differences, and what may override it."""
    record = json.loads((DOCS / "gradients.json").read_text("utf-8"))
    lines = [
        "| primitive | vjp = composition | vjp = differences | the same, GPU | float32 | kernels that may stand in |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        found = {device: record[device]["primitives"].get(name) for device in ("cpu", "cuda")}
        cells = [
            number(found["cpu"], "composition"),
            number(found["cpu"], "differences"),
            number(found["cuda"], "differences"),
            number(found["cpu"], "float32"),
        ]
        overrides = [f"[{device}: `{file}`]({link(page, PACKAGE / file)})" for file, device in kernels().get(name, [])]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {'<br>'.join(overrides) or '–'} |")
    return "\n".join(lines)


def commands(page: Path) -> str:
    """A row for each command, from the table in cli/__init__.py."""
    path = PACKAGE / "cli" / "__init__.py"
    assigned = (node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.Assign))
    table = next(node.value for node in assigned if ast.unparse(node.targets[0]) == "COMMANDS")
    lines = ["| command | what it does |", "| --- | --- |"]
    for name, summary in ast.literal_eval(table).items():
        lines.append(f"| [`{name}`]({link(page, path.with_name(f'{name}.py'))}) | {summary} |")
    return "\n".join(lines)


def number(errors: dict[str, float] | None, key: str) -> str:
    return "–" if errors is None else f"{errors[key]:.0e}"


def kernels() -> dict[str, list[tuple[str, str]]]:
    """{primitive: (file, device) of each kernel that is registered for it}."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((PACKAGE / "kernels").rglob("*.py")):
        for primitive, device in KERNEL.findall(path.read_text("utf-8")):
            found.setdefault(primitive, []).append((path.relative_to(PACKAGE).as_posix(), device))
    return found


def link(page: Path, target: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def pages() -> list[Path]:
    return sorted(path for path in DOCS.rglob("*.md") if "<!-- filled: " in path.read_text("utf-8"))


def main() -> None:
    for page in pages():
        before = page.read_text("utf-8")
        after = filled(before, page)
        if after != before:
            page.write_text(after, "utf-8")
            print("written:", page.relative_to(DOCS))


if __name__ == "__main__":
    main()
