"""The evaluation that a model's card is made from, at a size that takes seconds."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from scipy import ndimage

from lowgad import main
from models.card import DEFAULT_MODEL, ZOO, read_card
from models.condition import NAMES, SEQUENCE_NAMES, TIMING_NAMES
from models.evaluation.ablation import ablations
from models.evaluation.metrics import (
    FALSE,
    LEVELS,
    Found,
    Lesion,
    LesionRange,
    _components,
    held_out,
    lesion_error_ratio,
    lesions_of,
    make_test_sample,
    percent_enhancement,
    score,
    sensitivity_difference,
    threshold_at,
)
from models.runtime import NetworkEngine
from models.simulation.samples import TEST_SEED, VALIDATION_SEED, Sample, quiet_brain
from tests.numeric.phantoms import as_volume, head, prepared_head
from worker.lab import evaluation, evaluation_card
from worker.lab.evaluation import in_plane_order, real_rows, write_card, write_validation
from worker.pipeline import Result

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
    made = [make_test_sample(TEST_SEED + n, dose, 32) for n, dose in ((3, 0.1), (2, 0.33))]
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
    assert LesionRange(3, 5, 0.2, 0.4).holds(diameter_mm, enhancement) is holds


def test_rescans_without_contrast_are_said_to_be_of_a_third_and_of_a_tenth(evaluated: Path) -> None:
    assert {(row["said"], row["method"]) for row in rows(evaluated, "rescans")} == {
        (said, method) for said in ("10%", "33%") for method in ("network", "linear engine")
    }


def test_a_card_tells_every_stage_of_its_training_and_of_networks_beside_it_what_sets_them_apart() -> None:
    card = read_card(ZOO / DEFAULT_MODEL)
    card = replace(card, training_data="simulated, started from 7 steps on: site, started from 5 steps on: simulated")
    untold = replace(card, id="untold", seed=5, gate_offset=2.5, gate_strict_from=0)
    loose = replace(untold, id="loose", gate_strict_from=0.33)
    said = evaluation_card.render(card, {}, evaluation_card.Tested(2, 0, 40, 0.5, beside=(untold, loose)))
    assert "- simulated\n- 7 steps on: site\n- 5 steps on: simulated\n" in said
    training = f"variant small; preset {card.preset}, {card.steps} steps, seed 5; gate offset 2.5"
    data = "simulated, started from 7 steps on: site (and 1 stages before)"
    below = ", below 33% of the standard dose in proportion"
    assert f"\n- `untold`: {training}; {data}\n- `loose`: {training}{below}; {data}\n" in said


def test_an_evaluation_keeps_its_seeds(evaluated: Path) -> None:
    seeds = [int(row["seed"]) for row in rows(evaluated, "seeds")]
    assert len(seeds) == STUDIES
    assert min(seeds) >= TEST_SEED


def test_a_card_says_what_the_model_cannot_do_and_shows_every_table(evaluated: Path) -> None:
    card = (evaluated / "CARD.md").read_text()
    titles = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    assert titles == [
        "What it is for",
        "What it must not be used for",
        "The figures that matter",
        "Operating point",
        "What it learned from",
        "What it cannot do",
        "What the file is",
        "Evaluation",
        "Methods",
        "Lesions of 5 mm and more, against the standard dose",
        "SD and SD+",
        "Kinds of studies",
        "Lesions",
        "Lesions by enhancement",
        "Rescans without contrast",
        "What the inputs are worth",
        "What the embedding tells apart",
        "Every stage of its training, each started from the next",
    ]
    assert "research use" in card
    assert {row["dose"] for row in rows(evaluated, "methods")} == {"10%", "20%", "25%", "33%", "50%", "100%"}


def test_the_standard_dose_is_measured_as_acquired_and_as_the_linear_engine_treats_it(evaluated: Path) -> None:
    whole = {row["method"]: row for row in rows(evaluated, "methods") if row["dose"] == "100%"}
    smoothed, acquired = whole["true standard dose"], whole["standard dose as acquired"]
    assert smoothed["error_over_linear"] == acquired["error_over_linear"] == ""
    assert float(acquired["slope"].split()[0]) > float(smoothed["slope"].split()[0])
    assert float(acquired["false_per_ml"].split()[0]) > float(smoothed["false_per_ml"].split()[0])


def test_sd_plus_shows_lesions_more_strongly_than_sd_and_has_the_noise_of_the_low_dose(evaluated: Path) -> None:
    value = {
        (row["dose"], row["series"], metric): float(row[metric].split()[0])
        for row in rows(evaluated, "series")
        for metric in ("recovery", "cep_percent", "noise")
    }
    assert {key[:2] for key in value} == {
        *((dose, name) for dose in ("10%", "33%") for name in ("SD", "SD+", "low dose as acquired")),
        ("100%", "standard dose as acquired"),
    }
    for dose in ("10%", "33%"):
        sd, plus, low = ((dose, name) for name in ("SD", "SD+", "low dose as acquired"))
        assert value[*plus, "cep_percent"] > value[*sd, "cep_percent"] > value[*low, "cep_percent"] > 0
        assert value[*plus, "noise"] == pytest.approx(value[*low, "noise"], rel=0.1)
        assert value[*plus, "noise"] == pytest.approx(value[*sd, "noise"], rel=0.4)


def test_the_curves_of_the_froc_are_kept_as_figures_and_rise_with_what_is_allowed_falsely(evaluated: Path) -> None:
    curves: dict[tuple[str, ...], list[tuple[float, float, float]]] = {}
    for row in rows(evaluated, "froc"):
        point = (float(row["false_per_study"]), float(row["threshold"]), float(row["found"].split()[0]))
        curves.setdefault((row["dose"], row["method"], row["lesions"]), []).append(point)
    assert ("33%", "network", "found, below 5 mm") in curves
    for points in curves.values():
        rates, thresholds, found = zip(*points, strict=True)
        assert rates == (0.125, 0.25, 0.5, 1, 2, 4, 8)
        assert list(thresholds) == sorted(thresholds, reverse=True)
        assert np.isnan(found).all() or list(found) == sorted(found)


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
        "large.csv",
        "series.csv",
        "kinds.csv",
        "lesions.csv",
        "enhancement.csv",
        "froc.csv",
        "seeds.csv",
    }
    assert not (tmp_path / "CARD.md").exists()


def test_a_truth_counted_from_the_other_end_is_turned_and_one_of_another_image_refused() -> None:
    rng = np.random.default_rng(1)
    pre, ce = rng.normal(size=(4, 5, 6)), rng.normal(size=(4, 5, 6))
    as_it_is = in_plane_order({"pre": pre + 0.1 * ce, "ce": ce, "wm": np.array(1)}, pre)
    turned = in_plane_order({"pre": pre[::-1] + 0.1 * ce, "ce": ce[::-1], "wm": np.array(1)}, pre)
    assert np.array_equal(as_it_is["ce"], ce)
    assert np.array_equal(turned["ce"], ce)
    with pytest.raises(ValueError, match="not that of the series"):
        in_plane_order({"pre": ce, "ce": ce, "wm": np.array(1)}, pre)


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


def lesion(study: int, *, level: float, error: float = 0.1, before: float = 0.5, added: float = 0.2) -> Lesion:
    return Lesion(study, 6.0, 0.3, 1.0, 1.0, error, before, added, 0.02, 5.0, 1.2, level)


def of(*lesions: Lesion) -> Found:
    return Found([], list(lesions), np.zeros(len(LEVELS), int), studies=3)


def test_methods_are_compared_lesion_by_lesion_with_whole_studies_resampled() -> None:
    one = of(lesion(0, level=0.5, error=0.1), lesion(0, level=0.05, error=0.3), lesion(2, level=0.2, error=0.2))
    two = of(lesion(0, level=0.5, error=0.2), lesion(0, level=0.5, error=0.2), lesion(2, level=0.3, error=0.8))
    assert sensitivity_difference(one, 0.1, two, 0.1) == pytest.approx((-1 / 3, -1 / 2, 0))
    assert sensitivity_difference(one, 0.1, two, 0.4)[0] == pytest.approx(0)
    assert lesion_error_ratio(one, two, LesionRange()) == pytest.approx((0.5, 0.25, 1.0))
    nothing = lesion_error_ratio(of(), of(), LesionRange())
    assert np.isnan(nothing).all()


def test_a_dark_lesion_does_not_rule_the_percentage_of_enhancement() -> None:
    lesions = [lesion(0, level=1, before=0.001, added=0.1), lesion(1, level=1, before=0.999, added=0.3)]
    assert percent_enhancement(lesions)[0] == pytest.approx(40)


def test_contrast_to_noise_is_over_the_noise_of_the_image_and_not_over_its_anatomy() -> None:
    sample = make_test_sample(TEST_SEED, 0.33, 32)
    assert sample
    rng = np.random.default_rng(1)
    shape = (32, 32, 32)
    pre = np.where(np.arange(32) < 16, 1.0, 0.3) + rng.normal(0, 0.02, shape)  # white matter beside something dark
    truth, labels = np.zeros(shape, np.float16), np.zeros(shape, np.int16)
    labels[10:16, 10:16, 4:10] = 1
    truth[labels == 1] = 0.4
    brain = np.ones(shape, bool)
    quiet = quiet_brain(truth.astype(np.float32), brain, (1.0, 1.0, 1.0))
    images = np.stack([np.zeros(shape), pre, np.full(shape, 0.03)]).astype(np.float16)
    made = replace(sample, images=images, truth=truth, brain=brain, quiet=quiet, labels=labels, diameters_mm=(7.0,))
    (found,) = lesions_of(made, truth.astype(np.float32), 0)
    assert found.noise == pytest.approx(0.02, rel=0.1)
    assert found.cnr == pytest.approx(0.4 / 0.02, rel=0.1)
    assert found.lbr == pytest.approx(1.4, rel=0.02)
    assert (found.error, found.added) == (0, pytest.approx(0.4, rel=1e-3))


def test_a_false_rim_beside_enhancement_is_counted_apart_from_false_signal_far_from_it() -> None:
    truth = np.zeros((24, 24, 24), np.float32)
    truth[10:14, 10:14, 10:14] = np.linspace(0.4, 0.6, 4)
    brain = np.ones(truth.shape, bool)
    rim, far = truth.copy(), truth.copy()
    rim[14, 10:14, 10:14] = 0.3  # beside it
    far[2, 2, 2:18] = 0.3
    seen = [score(signal, truth, brain, (1.0, 1.0, 1.0)) for signal in (truth, rim, far)]
    assert all(seen)
    false = [(one.halo_per_ml > 0, one.false_per_ml > 0) for one in seen if one]
    assert false == [(False, False), (True, False), (False, True)]


def test_sd_plus_of_a_real_pair_is_scored_on_the_grid_of_the_low_dose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, phantom = prepared_head(stripped=True), head(stripped=True)
    level = np.quantile(phantom.pre[phantom.brain], 0.95)
    truth = np.maximum(phantom.enhancement, 0)
    np.savez(tmp_path / "truth.npz", ce=truth, brain=phantom.brain, wm=level)
    work = sitk.Resample(as_volume(truth).to_sitk(), prepared.pre.to_sitk())
    signals = iter(sitk.GetArrayFromImage(work) / prepared.scale * part for part in (1.0, 0.5))
    monkeypatch.setattr(evaluation, "find_files", lambda _: [])
    monkeypatch.setattr(evaluation, "run", lambda *_: Result({}, {}, (), prepared, next(signals)))
    engine = NetworkEngine(ZOO / DEFAULT_MODEL)
    found = {row["method"]: row for row in real_rows(engine, tmp_path, tmp_path / "truth.npz", lambda _: None)}
    assert [*found] == ["network", "network, SD+", "linear engine", "linear engine, SD+"]
    for name, row in found.items():
        assert float(row["slope"]) == pytest.approx(1.0 if name.startswith("network") else 0.5, abs=0.02)
        assert float(row["ce_error"]) < 0.02 or name.startswith("linear")
        assert bool(row["error_over_linear"]) is name.startswith("network")


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
