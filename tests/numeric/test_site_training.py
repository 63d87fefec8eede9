"""Training on a site's own triplets: the target, the layout, and the way from DICOM to a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from pydicom import dcmread

import lowgad
from models.agents import BY_NAME
from models.condition import NAMES
from models.simulation.phantom import make_phantom
from models.simulation.samples import Block, make_sample, sample_of
from models.simulation.scenario import Scenario
from models.training.network import VARIANTS, Network
from models.training.patches import Held
from models.training.site import cut, enhancement_chance, hold_out, padded, simulated_block, target
from models.training.train import PRESETS, Config, _stated, train
from models.volume import Array, Mask
from service.core.dicom.site_rules import SiteRule
from service.core.errors import Permanent, Reason
from tests.numeric.phantoms import MPRAGE
from worker.lab.phantom_study import write_phantom_study
from worker.lab.triplets import read_triplet, read_triplets

UNIT = (1.0, 1.0, 1.0)


def noise(sigma: float | Array, side: int = 64) -> tuple[Array, Mask]:
    voxels = np.random.default_rng(0).normal(0, 1, (side, side, side)) * sigma
    return voxels.astype(np.float32), np.ones((side,) * 3, bool)


@pytest.mark.parametrize(("t", "expected"), [(1.0, 0.01), (2.5, 0.5), (4.0, 0.99)])
def test_a_region_that_enhances_evenly_has_the_chance_that_its_t_stands_for(t: float, expected: float) -> None:
    z, brain = noise(0.04)
    z[28:36, 28:36, 28:36] = t * 0.04
    chance = enhancement_chance(z, brain, UNIT)
    assert chance[30:34, 30:34, 30:34].mean() == pytest.approx(expected, rel=0.35, abs=0.05)


def test_noise_that_is_doubled_in_places_is_measured_as_doubled() -> None:
    growing = np.linspace(0.02, 0.06, 64, dtype=np.float32)[:, None, None] * np.ones((64, 64, 64), np.float32)
    z, brain = noise(growing)
    z[50:56, 28:36, 28:36] = 2.5 * growing[50:56, 28:36, 28:36]
    assert enhancement_chance(z, brain, UNIT)[51:55, 30:34, 30:34].mean() == pytest.approx(0.5, abs=0.15)


def test_a_standard_dose_of_noise_alone_gives_almost_no_target() -> None:
    z, brain = noise(0.04)
    y = target(z, brain, UNIT)
    assert (enhancement_chance(z, brain, UNIT) > 0.5).mean() < 1e-5  # 6e-3 without the neighbours
    assert y.mean() < 0.01 * np.maximum(z, 0).mean()


def test_a_bright_lesion_of_one_voxel_is_kept() -> None:
    z, brain = noise(0.04)
    z[32, 32, 32] = 0.4
    assert target(z, brain, UNIT)[32, 32, 32] > 0.39


def scenario(dose_fraction: float, spacing_mm: float = 1.0) -> Scenario:
    agent = BY_NAME["gadobutrol"]
    return Scenario(3.0, agent, dose_fraction, MPRAGE, (spacing_mm,) * 3, 0.02, stripped=True, lesions=6)


def test_the_target_recovers_the_true_enhancement_of_a_phantom_to_one_per_cent_and_one_tenth_of_the_noise() -> None:
    sample = sample_of(make_phantom(4, shape=(64, 72, 64), scenario=scenario(1.0)))
    truth = sample.truth.astype(np.float32)
    z = truth + np.random.default_rng(0).normal(0, 0.03, truth.shape).astype(np.float32)
    y = target(z, sample.brain, sample.spacing_mm)
    clear, enhancing = sample.brain & (truth > 5 * 0.03), sample.brain & (truth > 0.1)
    assert np.polyfit(truth[clear], y[clear], 1)[0] == pytest.approx(1.0, abs=0.01)
    assert np.polyfit(truth[enhancing], y[enhancing], 1)[0] == pytest.approx(1.0, abs=0.03)  # p takes some of the faint
    assert np.abs(y - truth)[clear].mean() < 1.1 * np.abs(z - truth)[clear].mean()
    assert np.abs(y - truth)[sample.quiet].mean() < 0.1 * np.abs(z - truth)[sample.quiet].mean()


def test_after_a_scan_the_target_is_as_true_as_the_subtraction_and_quiet_where_that_is_not() -> None:
    sample = sample_of(make_phantom(5, shape=(64, 72, 64), scenario=scenario(1.0)))
    z, truth = sample.images[0].astype(np.float32), sample.truth.astype(np.float32)
    y = target(z, sample.brain, sample.spacing_mm)
    enhancing = sample.brain & (truth > 0.1)
    slopes = [np.polyfit(truth[enhancing], image[enhancing], 1)[0] for image in (y, z)]
    assert slopes[0] == pytest.approx(slopes[1], abs=0.02)  # what is missing from 1 is residual motion
    assert np.abs(y - truth)[enhancing].mean() < 1.1 * np.abs(z - truth)[enhancing].mean()
    assert np.abs(y - truth)[sample.quiet].mean() < 0.1 * np.abs(z - truth)[sample.quiet].mean()


@pytest.mark.parametrize("whole", [False, True])
def test_a_phantom_whose_standard_dose_is_acquired_is_otherwise_the_same(*, whole: bool) -> None:
    alone, both = (make_phantom(4, shape=(40, 40, 40), whole=whole, standard=asked) for asked in (False, True))
    for name in ("pre", "low", "enhancement"):
        assert np.array_equal(getattr(alone, name), getattr(both, name))
    assert alone.standard is None
    assert both.standard is not None


@pytest.fixture(scope="module")
def told() -> dict[str, Block]:
    """One study as it is told in training: by the simulator, and by what a site would have."""
    truth, masked, measured = make_sample(8), simulated_block(8, masked=True), simulated_block(8, masked=False)
    assert truth
    assert masked
    assert measured
    return {"truth": truth, "masked": masked, "measured": measured}


def test_what_a_network_sees_does_not_depend_on_its_target(told: dict[str, Block]) -> None:
    for other in ("masked", "measured"):
        assert np.array_equal(told[other].images, told["truth"].images)
        assert np.array_equal(told[other].condition, told["truth"].condition)


def test_a_measured_target_is_true_but_noisy_and_a_masked_one_quiet_where_nothing_enhances(
    told: dict[str, Block],
) -> None:
    truth = told["truth"]
    images = {name: block.truth.astype(np.float32) for name, block in told.items()}
    clear, noise = truth.brain & (images["truth"] > 0.3), float(np.median(truth.images[2][truth.brain]))
    for name in ("masked", "measured"):
        assert np.polyfit(images["truth"][clear], images[name][clear], 1)[0] == pytest.approx(1, abs=0.1)
        assert np.corrcoef(images["truth"][clear], images[name][clear])[0, 1] > 0.9
    expected = noise / np.sqrt(2 * np.pi)  # mean of the positive part of noise
    assert images["measured"][truth.quiet].mean() == pytest.approx(expected, rel=0.3)
    assert images["masked"][truth.quiet].mean() < 0.1 * expected
    assert np.array_equal(told["measured"].quiet, told["masked"].quiet)
    assert (told["measured"].quiet & truth.quiet).sum() > 0.8 * truth.quiet.sum()


def test_a_target_that_is_unknown_or_not_a_sites_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known targets: truth, masked, measured"):
        train(Config(target="wish"), tmp_path / "run")
    with pytest.raises(ValueError, match="a site's is what it measured"):
        train(Config(target="masked"), tmp_path / "run", source=hold_out({"a": [tiny(0.2)], "b": [tiny(0.2)]}))


def test_a_sites_studies_are_not_read_for_a_run_that_is_refused_anyway(tmp_path: Path) -> None:
    empty = tmp_path  # what could be read there fails by another name
    done = lowgad_train("--data", empty, "--target", "masked", "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert "a site's is what it measured" in done.output


def test_a_run_on_another_target_says_so() -> None:
    said = _stated(replace(PRESETS["smoke"], target="masked"), None, None).data
    assert said == "simulated, target: the standard dose as acquired, masked"


def test_a_block_smaller_than_a_patch_is_padded_and_one_larger_is_cut_to_cover_the_brain() -> None:
    block = sample_of(make_phantom(4, shape=(20, 42, 50), scenario=scenario(1.0)))
    layers, _ = Held(padded(block, 48), torch.device("cpu")).patch(48, np.random.default_rng(0))
    assert layers.shape == (6, 48, 48, 48)
    pieces = list(cut(block, 32, 4))
    assert {piece.brain.shape for piece in pieces} == {(20, 32, 32)}
    assert sum(piece.brain.sum() for piece in pieces) >= 0.97 * block.brain.sum()
    assert all(piece.images.shape[1:] == piece.truth.shape == piece.quiet.shape for piece in pieces)


def write_triplet(folder: Path, seed: int) -> None:
    shape = (56, 70, 60)
    phantom = make_phantom(seed, shape=shape, scenario=scenario(0.25, 3.0), whole=True, standard=True)
    write_phantom_study(phantom, seed, folder)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two usable studies, and two that are not."""
    folder = tmp_path_factory.mktemp("site")
    for study, seed in ((1, 1), (2, 5)):  # the motion gate refuses some others: what enhances in sulci looks moved
        write_triplet(folder / f"study-{study}", seed)
    shutil.copytree(folder / "study-1", folder / "incomplete")
    shutil.rmtree(folder / "incomplete" / "standard")
    shutil.copytree(folder / "study-1", folder / "swapped")
    (folder / "swapped" / "low").rename(folder / "swapped" / "other")
    (folder / "swapped" / "standard").rename(folder / "swapped" / "low")
    (folder / "swapped" / "other").rename(folder / "swapped" / "standard")
    return folder


def lowgad_train(*arguments: object) -> Result:
    return CliRunner().invoke(lowgad.main, ["train", "--preset", "smoke", *map(str, arguments)])


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([], ""),
        (["--unconditioned"], ", nothing of the acquisition told, given a dose response by the signal equations"),
    ],
)
def test_triplets_fine_tune_a_checkpoint_and_the_run_says_on_what(
    site: Path, tmp_path: Path, told: list[str], said: str
) -> None:
    start, smoke = tmp_path / "start.pt", PRESETS["smoke"]
    torch.save({"config": asdict(smoke), "step": 6, "average": Network(VARIANTS[smoke.variant]).state_dict()}, start)
    result = lowgad_train("--steps", 2, "--data", site, "--start", start, "--out", tmp_path / "run", *told)
    assert result.exit_code == 0, result.output
    assert "study-1: used" in result.output
    assert "incomplete: refused, ONE_SERIES_ONLY: no subfolder standard" in result.output
    assert "swapped: refused, STANDARD_DOSE" in result.output
    data = f"site: 1 study{said}, started from 6 steps on: simulated"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == data
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["config"]["data"] == data


def test_one_usable_study_is_not_enough(site: Path, tmp_path: Path) -> None:
    for name in ("study-1", "incomplete"):
        shutil.copytree(site / name, tmp_path / "data" / name)
    result = lowgad_train("--data", tmp_path / "data", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "usable studies of at least two patients are needed" in result.output


def changed(source: Path, target_folder: Path, roles: Sequence[str], **values: object) -> Path:
    """A copy of a study with other header values in some of its series; None removes an element."""
    shutil.copytree(source, target_folder)
    for role in roles:
        for path in (target_folder / role).iterdir():
            dataset = dcmread(path)
            for keyword, value in values.items():
                delattr(dataset, keyword) if value is None else setattr(dataset, keyword, value)
            dataset.save_as(path)
    return target_folder


def test_a_standard_dose_that_states_a_low_dose_is_refused(site: Path, tmp_path: Path) -> None:
    changed(site / "study-1", tmp_path / "data" / "stale", ["standard"], ContrastBolusVolume="1.9")
    ((_, error),) = read_triplets(tmp_path / "data", lambda _: None).refused
    assert error.reason is Reason.PAIR_NOT_COMPARABLE
    assert "0.025 mmol/kg" in error.detail


def test_a_low_dose_that_enhances_more_than_the_standard_dose_is_refused_without_a_stated_dose(
    site: Path, tmp_path: Path
) -> None:
    silent = changed(site / "swapped", tmp_path / "silent", ["low", "standard"], ContrastBolusVolume=None)
    with pytest.raises(Permanent, match=r"the low dose enhances \d\.\d+ times as much as the standard dose"):
        read_triplet(silent)


def test_what_the_low_dose_header_does_not_say_stays_unknown(site: Path, tmp_path: Path) -> None:
    _, block = read_triplet(changed(site / "study-1", tmp_path / "bare", ["low"], ContrastBolusAgent=None))
    known = dict(zip(NAMES, block.condition, strict=True))
    assert (known["agent_known"], known["dose_known"], known["log_dose_fraction"]) == (0, 0, 0)
    assert known["field_known"] == 1


def test_the_sites_protocols_say_what_the_low_dose_header_does_not_as_at_inference(site: Path, tmp_path: Path) -> None:
    bare = changed(site / "study-1", tmp_path / "bare", ["low"], ContrastBolusAgent=None, ContrastBolusVolume=None)
    rule = SiteRule(
        name="low dose", series_description="*low dose", role="low", agent="gadobutrol", dose_mmol_per_kg=0.025
    )
    _, block = read_triplet(bare, [rule])
    known = dict(zip(NAMES, block.condition, strict=True))
    assert (known["agent_known"], known["dose_known"]) == (1, 1)
    assert np.exp(known["log_dose_fraction"]) == pytest.approx(0.25)


def test_a_simulated_study_with_its_standard_dose_can_be_trained_on(tmp_path: Path) -> None:
    arguments = ["--seed", "1", "--dose", "0.25", "--spacing", "3", "--noise", "0.02", "--stripped", "--standard"]
    done = CliRunner().invoke(lowgad.main, ["simulate", str(tmp_path), *arguments])
    assert done.exit_code == 0, done.output
    assert read_triplet(tmp_path)[0] == "lowgad-phantom-1"


def test_all_studies_of_one_patient_are_held_out_whatever_is_read_first_or_added() -> None:
    patients = {name: [tiny(0.2), tiny(0.3)] for name in "abcd"}
    data = hold_out(patients)
    trained, held = ({id(block) for block in some} for some in (data.training, data.validation))
    assert held in [{id(block) for block in own} for own in patients.values()]
    assert trained | held == {id(block) for own in patients.values() for block in own}
    assert {id(block) for block in hold_out(dict(reversed(patients.items()))).validation} == held
    for name in "efghijkl":
        more = hold_out(patients | {name: [tiny(0.4)]})
        assert not trained & {id(block) for block in more.validation}


def test_studies_without_an_id_are_each_of_a_patient_of_their_own(site: Path, tmp_path: Path) -> None:
    known, _ = read_triplet(site / "study-1")
    everywhere = ("pre", "low", "standard")
    bare, _ = read_triplet(changed(site / "study-1", tmp_path / "bare", everywhere, PatientID=""))
    other = changed(
        site / "study-1", tmp_path / "other", everywhere, PatientID="Lowgad-Phantom-1 ", IssuerOfPatientID="here"
    )
    assert (known, bare) == ("lowgad-phantom-1", "bare")
    assert read_triplet(other)[0] == known


def tiny(value: float) -> Block:
    shape = (8, 8, 8)
    images, brain = np.zeros((3, *shape), np.float16), np.ones(shape, bool)
    truth = np.linspace(0, value, brain.size, dtype=np.float16).reshape(shape)
    return Block(images, truth, brain, brain, np.zeros(len(NAMES), np.float32))


def test_a_run_goes_on_with_the_same_studies_and_refuses_others(tmp_path: Path) -> None:
    patients = {name: [tiny(0.2)] for name in "abcd"}
    for steps, count in ((1, 3), (2, 3), (3, 4)):
        config = replace(PRESETS["smoke"], steps=steps, patch=16)
        if count == 4:
            with pytest.raises(ValueError, match="another configuration"):
                train(config, tmp_path, source=hold_out(dict(islice(patients.items(), count))), report=lambda _: None)
        else:
            train(config, tmp_path, source=hold_out(dict(islice(patients.items(), count))), report=lambda _: None)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
