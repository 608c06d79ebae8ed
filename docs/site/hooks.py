"""What the site needs besides Markdown: formulas as MathML, and links into the repository's source as pages.

Formulas are written `$...$` and `$$...$$`, as GitHub shows them; arithmatex finds them, and latex2mathml makes them
what a browser draws by itself, without a script or a font. A link from a page to a file outside docs/ leads, in the
site, to a page with that file's text (of a folder: its list of files), so that the site is whole without a network.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
LINK = re.compile(r"\]\((\.\.?/[^)\s#]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
LANGUAGES = {".py": "python", ".cu": "cuda", ".toml": "toml", ".md": "markdown", ".json": "json", ".jsonl": "json"}
LARGEST = 200_000  # bytes of a file that is shown


def on_config(config: Any) -> Any:
    """Leave claims that are not measured yet out of the navigation: measuring one writes its page."""
    for section in config.nav:
        for title, pages in section.items():
            section[title] = [page for page in pages if not page.startswith("claims/") or (DOCS / page).exists()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every file or folder outside docs/ that some page links to."""
    linked = {
        outside
        for file in files.documentation_pages()
        for match in LINK.finditer(file.content_string)
        if (outside := outside_docs(file.src_uri, match[1])) is not None
    }
    for path in sorted(linked):
        files.append(File.generated(config, page_of(path), content=shown(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links that leave docs/ at those pages, which a search is to find behind the book's own."""
    if page.file.src_uri.startswith("source/"):
        page.meta["search"] = {"boost": 0.1}
    here = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        outside = outside_docs(page.file.src_uri, match[1])
        if outside is None:
            return match[0]
        return f"]({posixpath.relpath(page_of(outside), here or '.')})"

    return LINK.sub(replaced, markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Formulas as MathML; and no table of contents as long as the page, where the headings are error messages."""
    if page.file.src_uri == "troubleshooting.md":
        for section in page.toc:
            for entry in section.children:
                entry.children = []

    def drawn(match: re.Match[str]) -> str:
        block = match[1] == "div"
        mathml = convert(html.unescape(match[3]).strip(), display="block" if block else "inline")
        for bar in ("&#x02016;", "&#x0007C;"):  # of a norm: as tall as its neighbours, on both sides
            mathml = mathml.replace(f"<mo>{bar}</mo>", f'<mo stretchy="false" lspace="0" rspace="0">{bar}</mo>')
        mathml = mathml.replace("<mi>&#x00064;</mi>", '<mi mathvariant="normal">d</mi>')  # \mathrm{d}, of a gradient
        return f'<div class="formula">{mathml}</div>' if block else mathml

    return FORMULA.sub(drawn, content)


def outside_docs(page: str, link: str) -> str | None:
    """The repository path that a link on docs/`page` leads to, None where that lies in docs/ or is not there."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    if path.startswith(("..", "docs/")) or path == "docs" or not (ROOT / path).exists():
        return None
    return path


def page_of(path: str) -> str:
    return f"source/{path}.md"


def shown(path: str) -> str:
    """The page of a file or folder."""
    target = ROOT / path
    if target.is_dir():
        names = sorted(entry.name for entry in target.iterdir() if entry.is_file() and not entry.name.startswith("."))
        return f"# {path}/\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
    if target.stat().st_size > LARGEST:
        return f"# {path}\n\nA file of {target.stat().st_size:,} bytes.\n"
    text = target.read_text("utf-8").rstrip("\n")
    return f"# {path}\n\n`````{LANGUAGES.get(target.suffix, 'text')}\n{text}\n`````\n"
