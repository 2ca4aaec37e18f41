"""The site builds without a warning, asks nobody for anything, and shows what a git host shows."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from mkdocs.commands.build import build
from mkdocs.config import load_config

from .pages import ROOT, text_of

PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
_COUNTED = ("h1", "h2", "h3", "h4", "li", "table", "tr", "pre", "img")


class Tags(HTMLParser):
    """Counts a page's tags within `inside`, and keeps what the page loads."""

    def __init__(self, inside: str | None = None) -> None:
        super().__init__()
        self._inside, self._depth = inside, 0
        self.counts: Counter[str] = Counter()
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self._depth += tag == self._inside
        if tag in _COUNTED and (self._depth or self._inside is None):
            self.counts[tag] += 1
        if tag in ("script", "img", "iframe"):
            self.loaded.append(values.get("src") or "")
        if tag == "link" and values.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.loaded.append(values["href"])

    def handle_endtag(self, tag):
        self._depth -= tag == self._inside


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        # Strict: a page outside of the navigation, or a dead link, raises.
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_every_page_is_built(site):
    built = {path.stem for path in site.glob("*.html")}
    assert built == {Path(name).stem for name in PAGES} | {"404"}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_what_a_git_host_shows_of_it(site, name):
    """Python-Markdown wants four blanks, and empty lines, where others do not."""
    built = Tags(inside="article")
    built.feed((site / name).with_suffix(".html").read_text(encoding="utf-8"))
    shown = Tags()
    shown.feed(MarkdownIt("commonmark").enable("table").render(text_of(f"docs/{name}")))
    assert built.counts == shown.counts


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        tags = Tags()
        tags.feed(text)
        assert tags.loaded
        assert not [place for place in tags.loaded if re.match(r"(\w+:)?//", place)], page.name
    for picture in (ROOT / "docs" / "pictures").glob("*.svg"):
        drawn = picture.read_text(encoding="utf-8")
        assert not re.search(r"(href|src|url)\s*[=(]\s*[\"']?\w+://", drawn), picture.name
