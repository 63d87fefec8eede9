"""The evaluation that a model's card is made from, at a size that takes seconds."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path

import pytest

from models.card import DEFAULT_MODEL, ZOO
from worker import evaluation
from worker.evaluation import write_card

STUDIES = 2
QUESTIONS = (
    {"head, whole or defaced", "skull-stripped"},
    {"SPGR", "MPRAGE", "SE"},
    {"below 2 T", "2 T and more"},
    {"noise below 0.03", "noise of 0.03 and more"},
    {"slices up to 1.5 mm", "thicker slices"},
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "model"
    folder.mkdir()
    for name in ("model.onnx", "card.toml"):
        shutil.copy(ZOO / DEFAULT_MODEL / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "SIDE", 40)
        write_card(folder, studies=STUDIES, real=None, say=lambda _: None)
    return folder


def rows(folder: Path, table: str) -> list[dict[str, str]]:
    with (folder / "evaluation" / f"{table}.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_study_is_of_one_kind_for_each_question_and_compared_with_the_true_standard_dose(evaluated: Path) -> None:
    studies = Counter[str]()
    for row in rows(evaluated, "kinds"):
        assert bool(row["error_over_linear"]) is (row["method"] != "linear engine")
        if row["method"] == "true standard dose":
            studies[row["kind"]] += int(row["studies"])
    assert [sum(studies[kind] for kind in kinds) for kinds in QUESTIONS] == [STUDIES] * len(QUESTIONS)


def test_a_card_says_what_the_model_cannot_do_and_shows_every_table(evaluated: Path) -> None:
    card = (evaluated / "CARD.md").read_text()
    titles = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    assert titles == [
        "What it cannot do",
        "Evaluation",
        "Methods",
        "Kinds of studies",
        "Lesions",
        "Rescans without contrast",
        "What the inputs are worth",
        "What the embedding tells apart",
    ]
    assert "research use" in card
    assert {row["dose"] for row in rows(evaluated, "methods")} == {"10%", "20%", "25%", "33%", "50%"}
