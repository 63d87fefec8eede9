"""The evaluation that a model's card is made from, at a size that takes seconds."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import ndimage

from lowgad import main
from models.card import DEFAULT_MODEL, ZOO
from models.condition import NAMES, SEQUENCE_NAMES, TIMING_NAMES
from models.training.ablation import ablations
from models.training.evaluate import FALSE, LEVELS, Found, Range, _components, held_out, make_test_sample, threshold_at
from models.training.samples import TEST_SEED, VALIDATION_SEED, Sample
from worker import evaluation
from worker.evaluation import write_card, write_validation

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


@pytest.fixture(scope="module")
def two() -> list[Sample]:
    """Two small studies at different doses."""
    made = [make_test_sample(TEST_SEED + n, dose, 32) for n, dose in ((0, 0.1), (1, 0.33))]
    assert all(made)
    return [sample for sample in made if sample]


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


def test_every_lesion_is_counted_once_by_diameter_and_once_by_enhancement(evaluated: Path) -> None:
    counts = [Counter[tuple[str, str]](), Counter[tuple[str, str]]()]
    for count, table in zip(counts, ("lesions", "enhancement"), strict=True):
        for row in rows(evaluated, table):
            count[row["dose"], row["method"]] += int(row["lesions"])
    assert counts[0] == counts[1]
    assert set(counts[0].values()) == {counts[0]["33%", "network"]} != {0}


@pytest.mark.parametrize(
    ("diameter_mm", "enhancement", "holds"),
    [(3, 0.2, True), (4.9, 0.39, True), (2.9, 0.3, False), (5, 0.3, False), (4, 0.19, False), (4, 0.4, False)],
)
def test_a_range_of_lesions_holds_its_lower_limits_and_not_its_upper_ones(
    diameter_mm: float, enhancement: float, holds: bool
) -> None:
    assert Range(3, 5, 0.2, 0.4).holds(diameter_mm, enhancement) is holds


def test_rescans_without_contrast_are_said_to_be_of_a_third_and_of_a_tenth(evaluated: Path) -> None:
    assert {(row["said"], row["method"]) for row in rows(evaluated, "rescans")} == {
        (said, method) for said in ("10%", "33%") for method in ("network", "linear engine")
    }


def test_an_evaluation_keeps_its_seeds(evaluated: Path) -> None:
    seeds = [int(row["seed"]) for row in rows(evaluated, "seeds")]
    assert len(seeds) == STUDIES
    assert min(seeds) >= TEST_SEED


def test_a_card_says_what_the_model_cannot_do_and_shows_every_table(evaluated: Path) -> None:
    card = (evaluated / "CARD.md").read_text()
    titles = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    assert titles == [
        "What it cannot do",
        "Evaluation",
        "Methods",
        "Kinds of studies",
        "Lesions",
        "Lesions by enhancement",
        "Rescans without contrast",
        "What the inputs are worth",
        "What the embedding tells apart",
    ]
    assert "research use" in card
    assert {row["dose"] for row in rows(evaluated, "methods")} == {"10%", "20%", "25%", "33%", "50%", "100%"}


def test_the_standard_dose_is_measured_as_acquired_and_as_the_linear_engine_treats_it(evaluated: Path) -> None:
    whole = {row["method"]: row for row in rows(evaluated, "methods") if row["dose"] == "100%"}
    smoothed, acquired = whole["true standard dose"], whole["standard dose as acquired"]
    assert smoothed["error_over_linear"] == acquired["error_over_linear"] == ""
    assert float(acquired["slope"].split()[0]) > float(smoothed["slope"].split()[0])
    assert float(acquired["false_per_ml"].split()[0]) > float(smoothed["false_per_ml"].split()[0])


def test_validation_is_on_other_studies_and_makes_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model.onnx", "card.toml"):
        shutil.copy(ZOO / DEFAULT_MODEL / name, tmp_path / name)
    monkeypatch.setattr(evaluation, "SIDE", 32)
    asked: list[int] = []

    def usable(*_: object, first: int, **__: object) -> tuple[dict[int, Sample], int]:
        asked.append(first)
        seeds = [first, first + 1]
        return dict(zip(seeds, held_out(seeds, 0.33, 32), strict=True)), 0

    monkeypatch.setattr(evaluation, "usable_studies", usable)
    write_validation(tmp_path, studies=2, say=lambda _: None)
    assert asked == [VALIDATION_SEED]
    assert {path.name for path in (tmp_path / "validation").iterdir()} == {
        "methods.csv",
        "kinds.csv",
        "lesions.csv",
        "enhancement.csv",
        "seeds.csv",
    }
    assert not (tmp_path / "CARD.md").exists()


def test_a_real_pair_that_cannot_be_read_is_said_before_anything_is_simulated(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "truth.npz", ce=np.zeros((2, 2, 2)), brain=np.ones((2, 2, 2)), wm=1)
    arguments = ["evaluate", str(ZOO / DEFAULT_MODEL), "--real", str(tmp_path / "empty")]
    alone = CliRunner().invoke(main, arguments)
    assert (alone.exit_code, "--real and --truth belong together" in alone.output) == (2, True)
    done = CliRunner().invoke(main, [*arguments, "--truth", str(tmp_path / "truth.npz")])
    assert done.exit_code == 1
    assert "EMPTY_UPLOAD" in done.output
    np.savez(tmp_path / "part.npz", ce=np.zeros((2, 2, 2)))
    np.save(tmp_path / "one.npy", np.zeros(2))
    for name, said in (("part.npz", "part.npz lacks brain, wm"), ("one.npy", "one.npy is no npz file")):
        done = CliRunner().invoke(main, [*arguments, "--truth", str(tmp_path / name)])
        assert done.exit_code == 1
        assert said in done.output
        assert "simulated studies" not in done.output


def test_models_of_one_name_are_not_compared() -> None:
    bundled = ZOO / DEFAULT_MODEL
    done = CliRunner().invoke(main, ["evaluate", str(bundled), "--validation", "--against", str(bundled)])
    assert done.exit_code == 1
    assert "need names of their own" in done.output


def test_a_threshold_is_not_lowered_to_where_false_signals_have_grown_together() -> None:
    counts = np.where((LEVELS > 0.2) & (LEVELS < 0.5), 9, 1)
    found = Found([], [], counts, studies=2)
    assert 0.5 <= threshold_at(found, 1.0) < 0.56
    assert threshold_at(found, 5.0) == LEVELS[0] < FALSE
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((24, 24, 24)), 1).astype(np.float32)
    brain = np.ones(noise.shape, bool)
    (low, high) = (_components(noise, brain, (1, 1, 1), level) for level in (0.0, 0.15))
    assert low < high


def test_an_unknown_header_value_takes_with_it_what_inference_would_not_know_either(two: list[Sample]) -> None:
    changed = dict(ablations(two))
    lost = {
        "field strength": {"field", "field_known", "log_effective_dose", "relaxivity", "agent_known"},
        "sequence": {*SEQUENCE_NAMES, *TIMING_NAMES},
    }
    lost["dose or agent"] = {"log_dose_fraction", "dose_known", "log_effective_dose", "relaxivity", "agent_known"}
    for group, names in lost.items():
        for sample, before in zip(changed[f"{group} unknown"], two, strict=True):
            zero = [name for name, value in zip(NAMES, sample.condition, strict=True) if value == 0]
            assert names <= {*zero}
            kept = [n for n, name in enumerate(NAMES) if name not in names]
            assert np.array_equal(sample.condition[kept], before.condition[kept])


def test_timing_is_shuffled_within_a_class_of_sequences(two: list[Sample]) -> None:
    assert [sample.conditions.sequence for sample in two] == ["SPGR", "MPRAGE"]
    alone = dict(ablations(two))["timing shuffled"]
    assert [sample.conditions for sample in alone] == [sample.conditions for sample in two]
    own, other = two[0].conditions, replace(two[0].conditions, repetition_time_s=0.0075)
    pair = dict(ablations([two[0], replace(two[0], conditions=other)]))["timing shuffled"]
    assert [sample.conditions for sample in pair] == [other, own]


def test_another_agent_is_told_at_the_share_of_its_standard_dose_and_another_dose_of_the_same_agent(
    two: list[Sample],
) -> None:
    changed = dict(ablations(two))
    for place, own in enumerate(two):
        other = two[1 - place].conditions
        agent, dose = changed["agent shuffled"][place].conditions, changed["dose shuffled"][place].conditions
        assert (agent.agent, dose.agent) == (other.agent, own.conditions.agent)
        assert agent.dose_fraction == pytest.approx(own.conditions.dose_fraction)
        assert dose.dose_fraction == pytest.approx(other.dose_fraction)
