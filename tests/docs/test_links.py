"""Nothing that the documents, or comments in code, lead to is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.documents import DOCUMENTS, ROOT, anchors, links, text_of

CODE = [path for folder in ("service", "worker", "models") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_of_a_document_leads_somewhere(document: str) -> None:
    missing = []
    for path, anchor in links(document):
        target = (ROOT / document).parent / path if path else ROOT / document
        name = target.resolve().relative_to(ROOT.resolve()).as_posix() if target.exists() else ""
        if not name or (anchor and anchor not in anchors(name)):
            missing.append(f"{path}#{anchor}")
    assert missing == []


def numbers_of_decisions() -> set[int]:
    """Those that have a page, and those that the index says were folded into another."""
    pages = {int(path.name[:4]) for path in (ROOT / "deploy/decisions").glob("0*.md")}
    folded = re.findall(r"^\| ((?:\d+, )*\d+) \|", text_of("deploy/decisions/README.md"), re.MULTILINE)
    return pages | {int(number) for row in folded for number in row.split(", ")}


@pytest.mark.parametrize("path", [*(ROOT / document for document in DOCUMENTS), *CODE], ids=lambda path: path.name)
def test_every_decision_that_is_named_can_be_found(path: Path) -> None:
    named = re.findall(r"\bADRs? (\d+)", path.read_text(encoding="utf-8"))
    assert {int(number) for number in named} <= numbers_of_decisions()


def test_the_index_lists_every_decision() -> None:
    listed = {path for path, _ in links("deploy/decisions/README.md")}
    assert {path.name for path in (ROOT / "deploy/decisions").glob("0*.md")} <= listed


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if re.match(r"deploy/decisions/0", name)])
def test_a_decision_is_a_page(document: str) -> None:
    assert len(text_of(document).split()) <= 900


@pytest.mark.parametrize("document", ["README.md", "DEVELOPERS.md", "SECURITY.md", "models/TRAINING.md"])
def test_every_path_that_a_document_names_exists(document: str) -> None:
    named = re.findall(r"`((?:service|worker|models|tests|deploy|benchmarks)/[\w./-]*)`", text_of(document))
    assert [name for name in named if not (ROOT / name).exists()] == []
