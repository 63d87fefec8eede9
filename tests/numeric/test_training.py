"""Training and export, at a size that takes seconds."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.condition import NAMES
from models.runtime import NetworkEngine
from models.training.evaluate import TEST_SEED, held_out, interval, score
from models.training.export import export, load_network
from models.training.network import VARIANTS, Network
from models.training.samples import QUIET, draw_patch, make_sample, quiet_brain
from models.training.train import FALSE_WEIGHT, LAST_SEED, PRESETS, TRAIN_SEED, VALIDATION_SEED, loss, train

TINY = replace(PRESETS["smoke"], steps=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(TINY, folder, report=lambda _: None)
    return folder


def test_a_run_goes_on_from_its_checkpoint_and_keeps_its_log(run: Path) -> None:
    train(replace(TINY, steps=3), run, report=lambda _: None)
    with (run / "log.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [2, 3]
    assert load_network(run / "checkpoint.pt")[1]["steps"] == 3


def test_a_checkpoint_of_another_configuration_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(TINY, seed=2), run, report=lambda _: None)


def test_an_exported_network_agrees_with_torch_on_a_size_it_was_not_traced_with(run: Path, tmp_path: Path) -> None:
    difference = export(run / "checkpoint.pt", tmp_path / "model", model_id="test", preset="smoke")
    engine = NetworkEngine(tmp_path / "model")
    network, _ = load_network(run / "checkpoint.pt")
    images = np.random.default_rng(0).normal(0.1, 0.3, (3, 12, 20, 16)).astype(np.float32)
    condition = np.zeros(len(NAMES), np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)[None], torch.from_numpy(condition)[None])[0, 0].numpy()
    assert difference < 1e-4
    assert np.abs(engine.run(images, condition) - expected).max() < 1e-4


def test_an_untrained_network_amplifies_what_is_clear_and_nothing_else() -> None:
    network = Network(VARIANTS["small"])
    condition = torch.zeros(1, len(NAMES))
    condition[0, NAMES.index("dose_known")] = 1.0
    condition[0, NAMES.index("log_dose_fraction")] = float(np.log(0.25))
    images = torch.full((1, 3, 8, 8, 8), 0.1)
    images[:, 2] = 0.005  # noise
    unclear = images.clone()
    unclear[:, 0] = 0.001
    with torch.no_grad():
        assert network(images, condition).mean().item() == pytest.approx(0.1 / 0.25, rel=0.06)
        assert network(unclear, condition).max().item() < 0.05 * 0.001 / 0.25


def test_the_loss_is_zero_for_the_truth_and_grows_with_false_and_missed_signal() -> None:
    truth = torch.zeros(1, 1, 4, 4, 4)
    truth[..., :2] = 0.5
    bound, brain = torch.full_like(truth, 2.0), torch.ones_like(truth)
    quiet = (truth == 0).float()
    assert loss(truth, bound, truth, brain, quiet).item() == pytest.approx(0.0, abs=1e-6)
    assert loss(truth + 0.2, bound, truth, brain, quiet).item() > 0.05
    assert loss(truth * 0.5, bound, truth, brain, quiet).item() > 0.05


def test_false_enhancement_weighs_more_in_quiet_brain_and_in_full_only_later() -> None:
    truth = torch.zeros(1, 1, 4, 4, 4)
    bound, brain = torch.full_like(truth, 2.0), torch.ones_like(truth)
    anywhere = loss(truth + 0.2, bound, truth, brain, torch.zeros_like(truth))
    quiet = loss(truth + 0.2, bound, truth, brain, brain)
    early = loss(truth + 0.2, bound, truth, brain, brain, false_weight=0.0)
    assert quiet.item() == pytest.approx(anywhere.item() + FALSE_WEIGHT * (0.2 - 0.05))
    assert early.item() == pytest.approx(anywhere.item())


def test_what_the_bound_takes_away_still_costs() -> None:
    truth = torch.full((1, 1, 4, 4, 4), 0.5)
    ones, none = torch.ones_like(truth), torch.zeros_like(truth)
    assert loss(truth * 2, truth, truth, ones, none).item() > 0.01  # clamped it is the truth


def test_a_patch_keeps_image_truth_and_spacing_together_when_it_is_turned() -> None:
    sample = make_sample(3, shape=(48, 40, 44))
    assert sample is not None
    names = [NAMES.index(f"log_spacing_{axis}") for axis in "ijk"]
    for seed in range(10):
        images, targets, condition = draw_patch(sample, 24, np.random.default_rng(seed))
        assert images.shape == targets.shape == (3, 24, 24, 24)
        assert sorted(condition[names]) == sorted(sample.condition[names])
        truth, brain, quiet = targets
        assert set(np.unique(targets[1:])) <= {0.0, 1.0}
        assert not (quiet > brain).any()
        assert truth[quiet > 0].max(initial=0.0) < QUIET


def test_quiet_brain_is_brain_away_from_any_enhancement() -> None:
    truth = np.zeros((20, 20, 20), np.float32)
    truth[10, 10, 10] = 0.5
    brain = np.zeros(truth.shape, bool)
    brain[5:] = True
    quiet = quiet_brain(truth, brain, (1.0, 1.0, 2.0))
    assert not (quiet & ~brain).any()
    assert not quiet[9:12, 10, 10].any()  # 2 mm apart along k
    assert quiet[12, 10, 10]
    assert not quiet[10, 10, 8]
    assert quiet[10, 10, 7]


@pytest.mark.parametrize("seed", [0, 401])
def test_a_seed_whose_phantoms_would_meet_the_evaluation_is_refused(seed: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="evaluation"):
        train(replace(TINY, seed=seed), tmp_path)


def test_training_validation_and_evaluation_draw_from_ranges_that_do_not_meet() -> None:
    last_of_training = TRAIN_SEED * (LAST_SEED + 1)
    assert last_of_training < TEST_SEED < TEST_SEED + 1_000_000 < VALIDATION_SEED


def test_scores_of_the_truth_are_perfect_and_a_shifted_signal_is_not() -> None:
    truth = np.zeros((40, 40, 40), np.float32)
    truth[10:16, 10:16, 10:16] = np.linspace(0.2, 0.8, 6)[:, None, None]
    brain = np.ones(truth.shape, bool)
    with np.errstate(divide="ignore"):
        perfect = score(truth, truth, brain, (1.0, 1.0, 1.0))
    elsewhere = score(np.roll(truth, 15, axis=0), truth, brain, (1.0, 1.0, 1.0))
    assert perfect is not None
    assert elsewhere is not None
    assert (perfect.ce_error, perfect.false_per_ml) == (0.0, 0.0)
    assert perfect.slope == pytest.approx(1.0)
    assert perfect.psnr_db == np.inf
    assert elsewhere.ce_error == pytest.approx(0.5, abs=0.01)
    assert elsewhere.false_per_ml > 1.0


def test_a_bootstrap_interval_holds_the_mean() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert low < mean < high
    assert mean == 2.5


def test_held_out_studies_have_the_asked_dose_and_are_the_same_every_time() -> None:
    one, again = (held_out(2, 0.1, side=40) for _ in range(2))
    assert [sample.scenario.dose_fraction for sample in one] == [0.1, 0.1]
    assert all(np.array_equal(a.images, b.images) for a, b in zip(one, again, strict=True))
