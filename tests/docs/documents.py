"""The documents of this project, and what tests read out of them: blocks, commands and links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "deploy/**/*.md", "models/**/*.md")
    for path in ROOT.glob(pattern)
)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)


def command_lines(document: str, program: str) -> list[list[str]]:
    """The words after `program` in the shell blocks, comments and variables in front left out."""
    lines = [re.sub(r"^([A-Z_]+=\S+ )+", "", line) for block in blocks(document, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def links(document: str) -> list[tuple[str, str]]:
    """Path and anchor of every link that leads into this project; an empty path is the document itself."""
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]*))?\)", prose)
    return [(path, anchor) for path, anchor in found if path or anchor]


def anchors(document: str) -> set[str]:
    """What the headings of a document can be linked by."""
    titles = re.findall(r"^#+ (.+)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
