"""README.md and docs/ refer only to existing pages, files and modules, in standard terms."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "relay" / "protocols").glob("*/README.md")),
]
FOLDERS = "relay|producers|tests|scripts|docs"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")
        for heading in headings
    }


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", prose(page)):
        assert (ROOT / name).exists(), name


@pages
def test_modules_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:relay|producers)(?:\.[a-z_]\w*)+)`", prose(page)):
        # A file name such as relay.ini is not a module.
        if name.rpartition(".")[2] in {"ini", "service", "conf"}:
            continue
        assert importlib.util.find_spec(name), name


def test_every_page_is_in_the_index() -> None:
    index = prose(ROOT / "docs" / "README.md")
    for page in PAGES[1:]:
        name = page.name if page.parent.name == "docs" else f"{page.parent.name}/README.md"
        assert name == "README.md" or f"{name})" in index or f"{name}#" in index, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pages
def test_the_words_are_those_of_the_field(page: Path) -> None:
    """Documents write "protocol". *Door* is a term of the code."""
    text = re.sub(r"`[^`]*`", "", prose(page))
    found = re.findall(r"[^\n]*\bdoors?\b[^\n]*", text, re.IGNORECASE)
    assert not found
