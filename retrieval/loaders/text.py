"""Plain text and Markdown: one document a file."""

from __future__ import annotations

from collections.abc import Iterator

from ..documents import Document
from .encoding import decode
from .file import File

__all__ = ["load_markdown", "load_text"]


def load_text(file: File) -> Iterator[Document]:
    """The text as it stands; its title is the file's name."""
    text = decode(file.read(), file.limits.encoding)
    yield file.document(text, "")


def load_markdown(file: File) -> Iterator[Document]:
    """The text as it stands; its title is the front matter's, else that of the first heading."""
    text = decode(file.read(), file.limits.encoding)
    yield file.document(text, _markdown_title(text))


def _markdown_title(text: str) -> str:
    """The front matter's `title:`, else the first level-1 heading outside fenced code, else ""."""
    lines = iter(text.splitlines())
    fence = ""
    in_front_matter = False
    for number, line in enumerate(lines):
        if number == 0 and line.rstrip() == "---":
            in_front_matter = True
        elif in_front_matter:
            if line.rstrip() in ("---", "..."):
                in_front_matter = False
            elif line.startswith("title:"):
                title = line.removeprefix("title:").strip().strip("\"'").strip()
                if title:
                    return title
        elif fence:
            if line.lstrip().startswith(fence):
                fence = ""
        elif line.lstrip().startswith(("```", "~~~")):
            fence = line.lstrip()[:3]
        elif line.startswith("# "):
            return line.removeprefix("# ").strip().rstrip("#").rstrip()
    return ""
