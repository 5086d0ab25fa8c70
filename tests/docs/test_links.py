"""Links lead somewhere, on GitHub and in the site alike, and every page is in the site's navigation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import DOCS, FENCE, PAGES, ROOT, github_anchors, links

CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def broken(page: Path, link: str) -> str | None:
    """What is wrong with a link of a page; None where it leads somewhere."""
    if link.startswith(("https://", "mailto:")):
        return None
    place, _, anchor = link.partition("#")
    found = (page.parent / place).resolve() if place else page
    if not found.exists():
        return f"{link}: there is no {place}"
    if page.parent == DOCS and not found.is_relative_to(DOCS):
        return f"{link}: the site has no files outside of docs/"
    if anchor and anchor not in github_anchors(found):
        return f"{link}: {found.name} has no such heading"
    return None


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: page.name)
def test_links_of_the_page_lead_somewhere(page):
    assert [wrong for link in links(page) if (wrong := broken(page, link))] == []


@pytest.mark.parametrize(
    "link", ["none.md", "tour.md#no-such-heading", "#nor-here", "../README.md", "../recipes/none.toml"]
)
def test_broken_links_are_noticed(link):
    assert broken(DOCS / "numbers.md", link)


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# What's `α, β`?\n\n## A & B\n\n```sh\n# no heading\n```\n\n## A & B\n\n## [Link](x.md) two\n"
    )
    assert github_anchors(page) == {"whats-α-β", "a--b", "a--b-1", "link-two"}


def test_every_page_is_in_the_navigation_once():
    named = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", CONFIG, flags=re.MULTILINE)
    assert sorted(named) == [page.name for page in PAGES]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it: any warning of mkdocs is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    loads = re.compile(
        r"<(?:script|img|iframe|link(?![^>]*canonical))[^>]*(?:src|href)=\"((?:https?:)?//[^\"]+)"
    )
    for page in PAGES:
        html = (site / f"{page.stem}.html").read_text(encoding="utf-8")
        assert loads.findall(html) == [], page.name
    assert not [
        style.name
        for style in site.rglob("*.css")
        if re.search(r"(@import|url\()\s*['\"]?https?:", style.read_text(encoding="utf-8"))
    ]


def test_site_has_the_tables_and_lists_that_github_shows(site):
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        html = (site / f"{page.stem}.html").read_text(encoding="utf-8").partition('role="main"')[2]
        assert html.count("<table") == len(re.findall(r"^\|[ :|-]*---[ :|-]*$", text, re.MULTILINE)), (
            page.name
        )
        assert html.count("<li>") == len(re.findall(r"^ *(?:-|\d+\.) ", text, re.MULTILINE)), page.name
        assert "\\|" not in html, page.name
