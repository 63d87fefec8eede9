"""The card of the bundled network says what its tables say, and owns up to the figures that were missed."""

from __future__ import annotations

import csv

import pytest

from models.card import DEFAULT_MODEL, ZOO, read_card
from worker.lab import evaluation_card

FOLDER = ZOO / DEFAULT_MODEL
TABLES = {
    path.stem: [*csv.DictReader(path.read_text(encoding="utf-8").splitlines())]
    for path in (FOLDER / "evaluation").glob("*.csv")
}
CARD = (FOLDER / "CARD.md").read_text(encoding="utf-8")


def test_the_front_of_the_card_is_that_of_its_model_and_its_tables() -> None:
    assert CARD.startswith(evaluation_card.front(read_card(FOLDER), TABLES))


def test_every_row_of_the_tables_stands_in_the_card() -> None:
    shown = {*CARD.splitlines()}
    for name in {*TABLES} - {"froc", "seeds"}:
        assert [row for row in TABLES[name] if f"| {' | '.join(row.values())} |" not in shown] == [], name


def test_the_card_ends_with_every_stage_of_the_training() -> None:
    assert CARD.endswith("".join(f"- {stage}\n" for stage in read_card(FOLDER).stages))


@pytest.mark.parametrize(
    ("found", "reached"),
    [
        ("0.590 (0.550 to 0.600)", "yes"),
        ("0.590 (0.550 to 0.640)", "by the mean alone: the interval reaches beyond"),
        ("0.610 (0.550 to 0.640)", "**no**"),
        ("nan", "**no**"),
    ],
)
def test_a_figure_is_reached_when_it_and_its_whole_interval_are(found: str, reached: str) -> None:
    methods = [
        {"dose": "10%", "method": method, "ce_error": "1", "error_over_linear": found, "false_per_ml": "0"}
        | {"halo_per_ml": "0"}
        for method in ("network", "linear engine")
    ]
    front = evaluation_card.front(read_card(FOLDER), {"methods": methods})
    assert f"| error over the linear engine's, 10 % | {found} | {found} |  | at most 0.6 | {reached} |\n" in front
