"""README is what its readers have time for, and its figures are those of the card."""

from __future__ import annotations

import csv
import re

from models.card import DEFAULT_MODEL, ZOO
from tests.docs.documents import text_of

README = "README.md"


def test_readme_is_short() -> None:
    text = text_of(README)
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1500


def test_no_line_of_the_changelog_is_longer_than_those_of_the_code() -> None:
    assert max(map(len, text_of("CHANGELOG.md").splitlines())) <= 120


def value(table: str, column: str, **wanted: str) -> float:
    """The mean of one figure of the evaluation."""
    lines = (ZOO / DEFAULT_MODEL / "evaluation" / f"{table}.csv").read_text(encoding="utf-8").splitlines()
    (row,) = [row for row in csv.DictReader(lines) if wanted.items() <= row.items()]
    return float(row[column].split()[0])


def said(row: str) -> list[str]:
    """The figures of a row of README's table of the network: network, linear, network, linear and what follows."""
    line = next(line for line in text_of(README).splitlines() if line.startswith(f"| {row} |"))
    cells = [re.match(r"[\d.]+( %)?", cell.strip()) for cell in line.split("|")[2:8]]
    return [cell[0] for cell in cells if cell]


def is_rounded(shown: str, measured: float) -> bool:
    """Whether a figure is the measured one, to the digits that are shown."""
    number, percent, _ = shown.partition(" %")
    unit = 10.0 ** -len(number.partition(".")[2])
    return abs(float(number) - (100 * measured if percent else measured)) <= 0.5001 * unit


def test_the_figures_of_readme_are_those_of_the_card() -> None:
    methods = [(dose, method) for dose in ("33%", "10%") for method in ("network", "linear engine")]
    whole = [("100%", "true standard dose"), ("100%", "standard dose as acquired")]
    rows = {
        "error, of white matter": ("methods", "ce_error", "dose", methods + whole),
        "false voxels per mL of quiet brain": ("methods", "false_per_ml", "dose", methods + whole),
        "false voxels per mL nearer to enhancement": ("methods", "halo_per_ml", "dose", methods + whole),
        "over the linear engine's": ("methods", "error_over_linear", "dose", methods[::2]),
        "false without any contrast": ("rescans", "false_per_ml", "said", methods),
        "lesions of 5 mm and more found, of 124": ("large", "found_above_0.1", "dose", methods),
        "the same at half a false component a study": ("large", "found_at_0.5_false", "dose", methods),
        "the same on one real pair": ("real", "error_over_linear", "data", [("real pair", "network")]),
    }
    for name, (table, column, key, places) in rows.items():
        measured = [value(table, column, method=method, **{key: place}) for place, method in places]
        shown = said(name)[: len(measured)]
        assert all(map(is_rounded, shown, measured)), (name, shown, measured)
        assert len(shown) == len(measured)
