"""Training and export, at a size that takes seconds."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Generator
from dataclasses import asdict, replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from scipy import ndimage

import lowgad
from models.card import STARTED, ModelError, read_card
from models.condition import MEASURED, NAMES, SEQUENCE_NAMES
from models.evaluation import metrics as evaluate
from models.evaluation.ablation import condition_grid, embedding, variance_shares
from models.evaluation.metrics import JUDGED_DOSE, held_out, interval, score, usable_studies
from models.quality import LIMITS, Figure
from models.runtime import NetworkEngine, upper_bound
from models.simulation import scanner
from models.simulation.samples import (
    TEST_SEED,
    TRAIN_SEED,
    VALIDATION_SEED,
    Block,
    Sample,
    make_sample,
    quiet_brain,
    stream,
)
from models.training.average import average
from models.training.curves import draw_curves
from models.training.export import HALO, TOLERANCE, ParityError, export, load_network
from models.training.network import CAP, FULL_RESOLUTION, RESPONSE, STRIDE, VARIANTS, Network, ResidualBlock, RMSNorm
from models.training.patches import Held, draw_batch
from models.training.response import learned
from models.training.train import (
    FALSE_WEIGHT,
    LAST_SEED,
    PRESETS,
    RESPONSE_SEED,
    Config,
    _start,
    _step,
    auxiliary_loss,
    gate_loss,
    loss,
    train,
)
from models.volume import Array
from tests.lineage import told

TINY = replace(PRESETS["smoke"], steps=2, full_share=0.5)


def small_stream(first_seed: int, workers: int, *_: object) -> Generator[Block, None, None]:
    """Small blocks, made in other processes as a run makes its large ones."""
    return stream(first_seed, workers, partial(make_sample, shape=(32, 32, 32)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.training.train.stream", small_stream)
        train(TINY, folder, report=lambda _: None)
    return folder


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are not about simulation take small blocks, made in this process."""

    def stream(first_seed: int, *_: object) -> Generator[Block, None, None]:
        made = (make_sample(seed, shape=(32, 32, 32)) for seed in itertools.count(first_seed))
        yield from (block for block in made if block)

    monkeypatch.setattr("models.training.train.stream", stream)


def test_a_run_goes_on_from_its_checkpoint_and_keeps_its_log(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.training.train.stream", small_stream)
    train(replace(TINY, steps=3), run, report=lambda _: None)
    with (run / "log.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [2, 3]
    assert load_network(run / "checkpoint.pt")[1]["steps"] == 3


@pytest.mark.usefixtures("small_heads")
def test_the_weights_to_start_from_fit_the_network_and_tell_where_they_come_from(tmp_path: Path) -> None:
    start = files("models.training") / "start" / "small-tune.pt"
    with as_file(start) as path:
        train(replace(TINY, steps=1), tmp_path, report=lambda _: None, start=path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["config"]["data"] == f"simulated{STARTED}{told()}"
    assert all(weights.dtype is torch.float32 for weights in saved["average"].values())


@pytest.mark.usefixtures("small_heads")
def test_a_run_learns_its_dose_response_first_and_studies_leave_it_as_it_is(tmp_path: Path) -> None:
    response, _ = learned(RESPONSE_SEED, TINY.acquisitions)
    train(replace(TINY, steps=1), tmp_path / "run", report=lambda _: None)
    train(TINY, tmp_path / "run", report=lambda _: None)  # goes on
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    train(TINY, tmp_path / "next", report=lambda _: None, start=checkpoint)
    for path in (checkpoint, tmp_path / "next" / "checkpoint.pt"):
        saved = torch.load(path, weights_only=True)
        for part, (name, weight) in itertools.product(("network", "average"), response.state_dict().items()):
            assert torch.allclose(saved[part][f"{RESPONSE}.{name}"], weight, atol=1e-6)


@pytest.mark.usefixtures("small_heads")
def test_the_average_of_runs_has_their_mean_weights_and_names_them(tmp_path: Path) -> None:
    trained = tmp_path / "first" / "checkpoint.pt"
    train(replace(TINY, steps=1), trained.parent, report=lambda _: None)
    again = tmp_path / "second" / "checkpoint.pt"
    train(replace(TINY, steps=1, seed=2), again.parent, report=lambda _: None, start=trained)
    reordered = torch.load(again, weights_only=True)
    torch.save(reordered | {"average": dict(reversed(reordered["average"].items()))}, again)
    done = CliRunner().invoke(lowgad.main, ["average", str(trained), str(again), "--out", str(tmp_path / "mean.pt")])
    assert done.exit_code == 0, done.output
    weights = [load_network(path)[0].state_dict()["stem.weight"] for path in (trained, again, tmp_path / "mean.pt")]
    assert torch.allclose(weights[2], (weights[0] + weights[1]) / 2)
    assert not torch.equal(weights[0], weights[1])
    config = load_network(tmp_path / "mean.pt")[1]
    assert config["data"] == "simulated, weights averaged with those of 1 more (1 steps of seed 2)"
    export(tmp_path / "mean.pt", tmp_path / "model", model_id="mean")
    assert "averaged" in read_card(tmp_path / "model").training_data


def test_runs_that_do_not_fit_together_are_not_averaged(tmp_path: Path) -> None:
    first = random_checkpoint(tmp_path / "first.pt")
    site = random_checkpoint(tmp_path / "site.pt", data="simulated, started from 9 steps on: site: 3 studies")
    blind = random_checkpoint(tmp_path / "blind.pt", conditioned=False)
    masked = random_checkpoint(tmp_path / "masked.pt", target="masked")
    stranger = random_checkpoint(tmp_path / "stranger.pt", seed=2)
    saved = torch.load(first, weights_only=True)
    unlike = torch.load(stranger, weights_only=True)
    responses = {name: weight for name, weight in saved["average"].items() if name.startswith(RESPONSE)}
    torch.save(unlike | {"average": unlike["average"] | responses}, stranger)
    responses = {name: weight + 0.1 for name, weight in responses.items()}
    torch.save(saved | {"average": saved["average"] | responses}, tmp_path / "response.pt")
    del saved["average"]["head.bias"]
    torch.save(saved, tmp_path / "older.pt")
    for others, says in (
        ([site], "site's studies"),
        ([blind], "another kind"),
        ([masked], "another kind"),
        ([tmp_path / "older.pt"], "another kind"),
        ([stranger], "did not start"),
        ([tmp_path / "response.pt"], "another dose response"),
        ([first], "twice"),
        ([], "at least two"),
    ):
        with pytest.raises(ValueError, match=says):
            average([first, *others], tmp_path / "mean.pt")
    with pytest.raises(ValueError, match="exists"):
        average([first, blind], first)


def test_weights_of_another_architecture_are_refused_by_name(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "older.pt")
    saved = torch.load(path, weights_only=True)
    del saved["average"]["encoder.1.norm.gain"]  # as before coarse levels had a norm at their end
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"another architecture.*1 do not fit, the first is encoder\.1\.norm\.gain"):
        export(path, tmp_path / "model", model_id="older")
    with pytest.raises(ValueError, match="another architecture"):
        train(TINY, tmp_path / "run", report=lambda _: None, start=path)


@pytest.mark.usefixtures("small_heads")
def test_a_checkpoint_with_the_names_of_before_is_loaded_averaged_and_gone_on_with(tmp_path: Path) -> None:
    path = train(replace(TINY, steps=1), tmp_path, report=lambda _: None)
    saved = torch.load(path, weights_only=True)
    before = {"encoder": "enter", "decoder": "leave", "auxiliary_heads": "told", "film": "modulate"}
    older = {"config": {{"learning_rate": "rate"}.get(name, name): value for name, value in saved["config"].items()}}
    for part in ("network", "average"):
        older[part] = {
            ".".join(before.get(word, word) for word in name.split(".")): weight for name, weight in saved[part].items()
        }
    assert {"told.0.bias", "enter.1.blocks.0.modulate.bias"} <= {*older["average"]}
    torch.save(saved, tmp_path / "today.pt")
    torch.save(saved | older, path)
    average([path, tmp_path / "today.pt"], tmp_path / "mean.pt")
    for one in (path, tmp_path / "mean.pt"):
        weights = load_network(one)[0].state_dict()
        assert all(torch.allclose(weights[name], weight) for name, weight in saved["average"].items())
    train(TINY, tmp_path, report=lambda _: None)
    assert load_network(path)[1]["steps"] == 2


def test_a_coarse_block_adds_the_same_however_large_its_input_has_grown() -> None:
    torch.manual_seed(0)
    block = random_block(normed=True)
    x, embedding = torch.randn(1, 16, 4, 4, 4, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    added = [block(x * size, embedding) - x * size for size in (1e3, 1e6)]
    assert added[0].abs().max() > 0.01
    assert torch.allclose(added[0], added[1], atol=1e-6)


def test_a_norm_gives_the_same_in_half_precision_up_to_sums_of_thousands() -> None:
    norm, x = RMSNorm(48), 1000 * torch.randn(1, 48, 4, 4, 4)
    assert torch.allclose(norm.half()(x.half()).float(), norm.float()(x), atol=0.01)


def random_block(*, normed: bool) -> ResidualBlock:
    block = ResidualBlock(16, 8, normed=normed).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return block


@torch.no_grad()
def test_the_coarse_levels_of_the_weights_to_start_from_tell_enhancement_and_are_heard() -> None:
    with as_file(files("models.training") / "start" / "small-tune.pt") as path:
        network, _ = load_network(path)
    sample = make_sample(3, shape=(40, 40, 40))
    assert sample is not None
    seen = torch.from_numpy(sample.images.astype(np.float32))[None], torch.from_numpy(sample.condition)[None]
    parts = network.parts(*seen)
    for fewer, said in zip((2, 4), parts.auxiliary, strict=True):
        regions = [sample.truth, sample.brain, sample.quiet]
        layers = torch.from_numpy(np.stack([region.astype(np.float32) for region in regions]))
        truth, brain, quiet = torch.nn.functional.avg_pool3d(layers, fewer)
        enhancing = said[0, 1][(truth > 0.1) & (brain == 1)]
        assert torch.quantile(said[0, 1][quiet == 1], 0.99) < torch.median(enhancing)
    network.up_1.weight.zero_()
    assert (network.parts(*seen).gate - parts.gate).std() > 0.3


def reach(network: Network) -> int:
    """How far away, in voxels, an input can be that an output depends on."""
    places = range(60, 60 + STRIDE)
    images = torch.rand(1, 3, 4, 4, 124 + STRIDE, dtype=torch.float64, requires_grad=True)
    parts = network.parts(images, torch.zeros(1, len(NAMES), dtype=torch.float64))
    farthest = 0
    for place in places:
        (slope,) = torch.autograd.grad((parts.signal + parts.gate)[..., place].sum(), images, retain_graph=True)
        at = slope.abs().sum(dim=(0, 1, 2, 3)).nonzero()
        farthest = max(farthest, place - int(at.min()), int(at.max()) - place)
    return farthest


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_halo_of_tiles_covers_what_a_voxel_depends_on_in_whole_strides(variant: str) -> None:
    torch.manual_seed(0)
    network = Network(VARIANTS[variant]).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "film" not in name and not name.startswith(RESPONSE):  # which sees one voxel
                parameter.copy_(0.05 * torch.rand_like(parameter))  # positive: nothing cancels
    assert HALO[variant] - STRIDE < reach(network) <= HALO[variant]
    assert HALO[variant] % STRIDE == 0


def test_a_checkpoint_of_another_configuration_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(TINY, seed=2), run, report=lambda _: None)


def test_an_exported_network_agrees_with_torch_on_a_size_it_was_not_traced_with(run: Path, tmp_path: Path) -> None:
    difference = export(run / "checkpoint.pt", tmp_path / "model", model_id="test")
    engine = NetworkEngine(tmp_path / "model")
    network, _ = load_network(run / "checkpoint.pt")
    images = np.random.default_rng(0).normal(0.1, 0.3, (3, 12, 20, 16)).astype(np.float32)
    condition = np.zeros(len(NAMES), np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)[None], torch.from_numpy(condition)[None])[0, 0].numpy()
    assert difference < 1e-4
    assert np.abs(engine.run(images, condition) - expected).max() < 1e-4


def test_a_network_without_conditions_forgets_the_acquisition_but_for_its_bound(tmp_path: Path) -> None:
    network, _ = load_network(random_checkpoint(tmp_path / "checkpoint.pt", conditioned=False))
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.normal(0.1, 0.3, (1, 3, 8, 8, 8)).astype(np.float32))
    told = rng.normal(0, 0.5, len(NAMES)).astype(np.float32)
    told[NAMES.index("dose_known")] = 1

    def predicted(**changed: float) -> tuple[Array, Array]:
        condition = told.copy()
        for name, value in changed.items():
            condition[NAMES.index(name)] = value
        with torch.no_grad():
            raw, bound = network.unbounded(images, torch.from_numpy(condition)[None])
        return raw.numpy(), bound.numpy()

    same = predicted()[0]
    for name in NAMES:
        assert np.array_equal(predicted(**{name: 1.5})[0], same) is (name not in MEASURED), name
    tenth, half = (predicted(log_dose_fraction=np.log(dose))[1] for dose in (0.1, 0.5))
    assert np.allclose(tenth, 5 * half)


@pytest.mark.usefixtures("small_heads")
def test_a_run_without_conditions_says_so_and_starts_no_run_with_them(tmp_path: Path) -> None:
    arguments = ["--preset", "smoke", "--steps", "1", "--out", str(tmp_path / "blind"), "--unconditioned"]
    done = CliRunner().invoke(lowgad.main, ["train", *arguments])
    assert done.exit_code == 0, done.output
    network, config = load_network(tmp_path / "blind" / "checkpoint.pt")
    assert not network.conditioned
    assert config["data"] == "simulated, nothing of the acquisition told"
    assert config["preset"] == "smoke"
    with pytest.raises(ValueError, match="only the reverse"):
        train(TINY, tmp_path / "told", report=lambda _: None, start=tmp_path / "blind" / "checkpoint.pt")


@pytest.mark.usefixtures("small_heads")
def test_a_run_without_conditions_learns_its_own_dose_response_and_keeps_it(tmp_path: Path) -> None:
    told = random_checkpoint(tmp_path / "told.pt")
    blind = replace(TINY, conditioned=False)
    train(replace(blind, steps=1), tmp_path / "blind", report=lambda _: None, start=told)
    train(blind, tmp_path / "blind", report=lambda _: None, start=told)  # goes on
    checkpoints = [tmp_path / name / "checkpoint.pt" for name in ("blind", "next", "other")]
    train(blind, tmp_path / "next", report=lambda _: None, start=checkpoints[0])
    train(replace(blind, seed=2), tmp_path / "other", report=lambda _: None, start=told)
    average(checkpoints, tmp_path / "mean.pt")
    own, _ = learned(RESPONSE_SEED, blind.acquisitions, told=False)
    for checkpoint in (*checkpoints, tmp_path / "mean.pt"):
        network, config = load_network(checkpoint)
        for weights, expected in zip(network.response.parameters(), own.parameters(), strict=True):
            assert torch.allclose(weights, expected, atol=1e-6)
        last = config["data"].partition(", started from")[0]
        assert ("given a dose response" in last) is (checkpoint.parent.name != "next")


def test_the_embedding_of_a_network_without_conditions_tells_nothing_apart(tmp_path: Path) -> None:
    export(random_checkpoint(tmp_path / "c.pt", conditioned=False), tmp_path, model_id="blind")
    grid, vectors = condition_grid()
    assert set(variance_shares(grid, embedding(tmp_path / "model.onnx", vectors)).values()) == {0.0}


def random_checkpoint(path: Path, spread: float = 1.0, **config: str | bool | float) -> Path:
    """A checkpoint of a network that does something everywhere, without training it."""
    torch.manual_seed(int(config.get("seed", 0)))
    network = Network(VARIANTS["small"])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter)).mul_(spread)
    stated = {"variant": "small", "seed": 1, **config}
    torch.save({"config": stated, "step": 7, "average": network.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with both precisions."""
    folder = tmp_path_factory.mktemp("both")
    export(random_checkpoint(folder / "checkpoint.pt"), folder, model_id="both", half=True)
    return folder


def predict(path: Path, images: Array, condition: Array) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {one.type for one in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)"}
    signal: Array = session.run(["signal"], {"images": images[None], "condition": condition[None]})[0][0, 0]
    return signal


def test_the_half_precision_network_agrees_with_torch_as_its_card_says(both: Path) -> None:
    card = read_card(both)
    network, _ = load_network(both / "checkpoint.pt")
    rng = np.random.default_rng(5)
    images = rng.normal(0.1, 0.3, (3, 12, 20, 16)).astype(np.float32)
    condition = rng.normal(0, 0.5, len(NAMES)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)[None], torch.from_numpy(condition)[None])[0, 0].numpy()
    half, full = (predict(card.networks[name][0], images, condition) for name in ("fp16", "fp32"))
    assert card.parity is not None
    assert card.parity_fp16 is not None
    assert card.parity <= TOLERANCE["fp32"]
    assert card.parity < card.parity_fp16 <= TOLERANCE["fp16"]
    assert 0 < np.abs(half - expected).max() < TOLERANCE["fp16"]
    assert np.abs(full - expected).max() < TOLERANCE["fp32"]


def test_the_half_precision_network_is_half_as_large_and_keeps_the_bound_exactly(both: Path) -> None:
    card = read_card(both)
    full, half = (path.stat().st_size for path, _ in card.networks.values())
    assert half < 0.6 * full
    rng = np.random.default_rng(6)
    images = rng.normal(-0.1, 0.5, (3, 12, 20, 16)).astype(np.float32)
    images[1] *= 100
    condition = np.zeros(len(NAMES), np.float32)  # dose unknown
    signal = predict(card.networks["fp16"][0], images, condition)
    bound = (upper_bound(images[0], None) - np.float32(1e-3)) / np.float32(1.001)  # without its margin
    assert signal.min() >= 0
    assert (signal <= bound * (1 + 1e-6) + 1e-6).all()


def test_what_the_coarse_levels_are_asked_in_training_is_not_exported(both: Path) -> None:
    for name in ("model.onnx", "model-fp16.onnx"):
        graph = onnx.load(both / name).graph
        names = {one.name for one in graph.initializer} | {name for node in graph.node for name in node.output}
        assert any("up_1" in name for name in names)
        assert not any("auxiliary" in name for name in names)


def test_exporting_again_without_half_precision_leaves_none_behind(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint.pt")
    for half in (True, False):
        export(checkpoint, tmp_path / "model", model_id="test", half=half)
        assert ("fp16" in read_card(tmp_path / "model").networks) is half
        assert (tmp_path / "model" / "model-fp16.onnx").exists() is half


@pytest.mark.parametrize(("spread", "half"), [(1e4, True), (1e12, False)], ids=["fp16", "fp32"])
def test_a_network_that_differs_from_torch_gets_no_card(tmp_path: Path, spread: float, half: bool) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint.pt", spread)
    with pytest.raises(ParityError, match="differ"):
        export(checkpoint, tmp_path, model_id="test", half=half)
    with pytest.raises(ModelError, match="incomplete"):
        read_card(tmp_path)


@pytest.mark.parametrize(("conditioned", "strict_from", "half"), [(True, 0.33, 1), (False, 0.0, 2)])
def test_the_operating_point_is_in_the_graph_and_takes_from_the_gate_what_the_card_says(
    tmp_path: Path, conditioned: bool, strict_from: float, half: int
) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint.pt", conditioned=conditioned)
    images = np.random.default_rng(0).normal(0.1, 0.1, (3, 16, 16, 16)).astype(np.float32)
    signals = {}
    for offset in (0.0, 12.0, 14.0):
        export(checkpoint, tmp_path / f"{offset}", model_id="test", gate_offset=offset)
        card, engine = read_card(tmp_path / f"{offset}"), NetworkEngine(tmp_path / f"{offset}")
        assert (card.gate_offset, card.gate_strict_from) == (offset, strict_from)
        for dose in (0.165, 0.33):
            condition = np.zeros(len(NAMES), np.float32)
            condition[[NAMES.index("log_dose_fraction"), NAMES.index("dose_known")]] = np.log(dose), 1
            signals[offset, dose] = float(engine.run(images, condition).sum())
    for dose, taken in ((0.165, half), (0.33, 2)):  # a shut gate is the exponential of its logit
        assert signals[0, dose] > signals[12, dose] > signals[14, dose] > 0
        assert signals[12, dose] / signals[14, dose] == pytest.approx(np.exp(taken), rel=0.05)


@pytest.mark.parametrize(("dose", "share"), [(0.066, 0.2), (0.165, 0.5), (0.33, 1.0), (0.5, 1.0), (None, 1.0)])
def test_below_a_third_of_the_dose_the_gate_is_less_strict_in_proportion(
    tmp_path: Path, dose: float | None, share: float
) -> None:
    network, _ = load_network(random_checkpoint(tmp_path / "checkpoint.pt"))
    images = torch.from_numpy(np.random.default_rng(0).normal(0.1, 0.1, (1, 3, 8, 8, 8)).astype(np.float32))
    condition = torch.zeros(1, len(NAMES))
    if dose:
        condition[0, NAMES.index("log_dose_fraction")] = np.log(dose)
        condition[0, NAMES.index("dose_known")] = 1
    network.gate_offset = 3.0
    with torch.no_grad():
        (raw, _), parts = network.unbounded(images, condition), network.parts(images, condition)
        expected = network.opened(parts.signal, parts.gate, torch.tensor(share))
        assert torch.allclose(raw, expected, rtol=1e-5)
        assert (expected > network.opened(parts.signal, parts.gate, torch.tensor(2 * share))).any()


def test_a_run_learns_at_the_operating_point_it_is_given_and_refuses_a_negative_one(tmp_path: Path) -> None:
    block = make_sample(3, shape=(32, 32, 32))
    assert block
    losses = []
    for offset in (0.0, 4.0):
        config = replace(TINY, loss_offset=offset)
        begun = _start(config, tmp_path, None)
        assert begun.average.gate_offset == offset
        losses.append(_step(begun, config, [begun.hold(block)]).item())
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="a loss offset of -1 is negative"):
        train(replace(TINY, loss_offset=-1.0), tmp_path)


def test_a_network_is_exported_at_the_operating_point_of_its_training_unless_another_is_chosen(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pt", loss_offset=4.0)
    for chosen, written in ((None, 4.0), (3.0, 3.0), (0.0, 0.0)):
        export(checkpoint, tmp_path, model_id="test", gate_offset=chosen)
        assert read_card(tmp_path).gate_offset == written


def test_what_a_gate_lets_through_grows_with_signal_and_evidence_and_stays_below_both_limits() -> None:
    network = Network(VARIANTS["small"])
    network.gate_offset = 4.0
    signal, gate = torch.meshgrid(torch.linspace(0, 3, 31), torch.linspace(-200, 60, 131), indexing="ij")
    shown = network.opened(signal, gate, torch.tensor(1.0))
    assert torch.isfinite(shown).all()
    assert (shown >= 0).all()
    assert (shown <= signal).all()
    assert (shown <= CAP * torch.exp(torch.clamp(gate - 4, min=-30)) * 1.0001).all()
    assert shown.diff(dim=0).min() >= -1e-12
    assert shown.diff(dim=1).min() >= -1e-12
    assert torch.allclose(shown[:, gate[0] > 40], signal[:, gate[0] > 40])
    assert shown[:, gate[0] < -40].max() < 1e-10


def test_an_operating_point_that_opens_the_gate_further_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="negative"):
        export(random_checkpoint(tmp_path / "c.pt"), tmp_path, model_id="test", gate_offset=-1)


@pytest.mark.parametrize(
    ("data", "starts", "holds"),
    [
        (None, "simulated: ICBM 152", "simulated studies"),
        ("simulated", "simulated: ICBM 152", "simulated studies"),
        ("site: 12 studies", "site: 12 studies", "one site's own studies"),
        ("site: 12 studies, started from 7 steps on: simulated", "site: 12 studies, started", "one site's own studies"),
        ("simulated, started from 7 steps on: site: 3 studies", "simulated: ICBM 152", "one site's own studies"),
    ],
)
def test_the_card_says_what_the_checkpoint_was_trained_on(
    tmp_path: Path, data: str | None, starts: str, holds: str
) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint.pt", **({} if data is None else {"data": data}))
    export(checkpoint, tmp_path, model_id="test")
    card = read_card(tmp_path)
    assert card.training_data.startswith(starts)
    assert len(card.stages) == 1 + ("started" in (data or ""))
    assert ("ICBM" in card.training_data) is ("simulated" in (data or "simulated"))
    assert any(holds in limit for limit in card.limits)
    assert ("a site's own" in card.intended_use) is ("site" in (data or ""))
    assert "simulated data" in card.intended_use  # a site's network has the dose response of the simulator, too


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (replace(PRESETS["smoke"], preset="smoke", steps=2, seed=5), "smoke"),
        (
            replace(PRESETS["smoke"], preset="smoke", learning_rate=2e-3, batch=4),
            "smoke with batch 4, learning_rate 0.002",
        ),
        (PRESETS["smoke"], "own"),
    ],
)
def test_the_card_names_the_preset_of_the_run_and_where_it_differs(tmp_path: Path, config: Config, shown: str) -> None:
    export(random_checkpoint(tmp_path / "c.pt", **asdict(config)), tmp_path, model_id="test")
    assert read_card(tmp_path).preset == shown


def test_a_card_with_another_kind_of_operating_point_is_refused(tmp_path: Path) -> None:
    export(random_checkpoint(tmp_path / "c.pt"), tmp_path, model_id="test", gate_offset=1)
    card = tmp_path / "card.toml"
    card.write_text(card.read_text().replace("gate_offset = 1", "gate_offset = [1.0, 0.0, 9.0] #"))
    with pytest.raises(ModelError, match="TypeError"):
        read_card(tmp_path)


def test_the_curves_of_a_run_are_drawn_from_its_log(tmp_path: Path) -> None:
    log, out = tmp_path / "log.csv", tmp_path / "curves.png"
    log.write_text("step,loss,minutes,ce_error,slope,false_per_ml\n2,0.3,0.1,nan,nan,nan\n4,0.2,0.2,0.1,0.9,3\n")
    draw_curves(log, out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_log_without_rows_has_no_curves(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss\n")
    with pytest.raises(ValueError, match="no rows"):
        draw_curves(tmp_path / "log.csv", tmp_path / "curves.png")


def test_an_untrained_network_amplifies_what_is_clear_and_nothing_else() -> None:
    network = Network(VARIANTS["small"])
    condition = torch.zeros(1, len(NAMES))
    condition[0, NAMES.index("dose_known")] = 1.0
    condition[0, NAMES.index("log_dose_fraction")] = float(np.log(0.25))
    images = torch.full((1, 3, 8, 8, 8), 0.1)
    images[:, 2] = 0.005  # noise
    unclear = images.clone()
    unclear[:, 0], unclear[:, 2] = 0.02, 0.1
    with torch.no_grad():
        assert network(images, condition).mean().item() == pytest.approx(0.1 / 0.25, rel=0.06)
        assert network(unclear, condition).max().item() < 0.05 * 0.02 / 0.25


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


def test_one_clear_voxel_among_noise_does_not_open_its_gate_by_itself() -> None:
    network = Network(VARIANTS["small"])
    condition = torch.zeros(1, len(NAMES))
    images = torch.zeros(1, 3, 8, 8, 8)
    images[:, 2] = 0.01  # noise
    images[0, 0, 4, 4, 4] = 0.3
    solid = images.clone()
    solid[0, 0, 2:7, 2:7, 2:7] = 0.3
    with torch.no_grad():
        alone, among = (torch.sigmoid(network.parts(seen, condition).gate)[0, 0, 4, 4, 4] for seen in (images, solid))
    assert alone < 0.1
    assert among > 0.99


@torch.no_grad()
def test_a_gate_opens_wider_at_the_edge_of_what_is_clear_and_not_for_a_voxel_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, condition = Network(VARIANTS["small"]), torch.zeros(1, len(NAMES))
    alone = torch.zeros(1, 3, 12, 12, 12)
    alone[:, 2] = 0.01  # noise
    alone[0, 0, 6, 6, 6] = 0.3
    solid = alone.clone()
    solid[0, 0, 2:7, 2:7, 2:7] = 0.3
    wider = [network.parts(images, condition).gate[0, 0] for images in (alone, solid)]
    monkeypatch.setattr("models.training.network.NEIGHBOURLY", 0.0)
    own = [network.parts(images, condition).gate[0, 0] for images in (alone, solid)]
    gained = [more - less for more, less in zip(wider, own, strict=True)]
    assert min(one.min() for one in gained) >= 0
    assert max(one.max() for one in gained) == pytest.approx(2, abs=1e-4)
    assert gained[0][6, 6, 6] == 0
    assert gained[1][4, 4, 8] > 1.5


def test_what_a_coarse_level_says_costs_nothing_only_where_it_is_the_truth() -> None:
    targets = torch.zeros(1, 3, 8, 8, 8)
    targets[:, 0, :4], targets[:, 1], targets[:, 2, 4:] = 0.5, 1, 1  # one half enhances, the other is quiet
    truth = [torch.nn.functional.avg_pool3d(targets[:, :1], fewer) for fewer in (2, 4)]
    right = [torch.cat([signal, 40 * (signal - 0.25)], 1) for signal in truth]
    assert auxiliary_loss(right, targets) < 1e-3
    for level in (0, 1):
        for channel in (0, 1):
            wrong = [said.clone() for said in right]
            wrong[level][:, channel] *= -1
            assert auxiliary_loss(wrong, targets) > 0.1


@pytest.mark.usefixtures("small_heads")
def test_a_share_of_nothing_leaves_the_full_resolution_as_it_was(tmp_path: Path) -> None:
    begun = random_checkpoint(tmp_path / "begun.pt")
    config = replace(PRESETS["smoke"], steps=1, validation=0, full_share=0.0)
    train(config, tmp_path / "run", start=begun, report=lambda _: None)
    before, after = (torch.load(path, weights_only=True)["average"] for path in (begun, tmp_path / "run/checkpoint.pt"))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert not {name for name in changed if name.startswith(FULL_RESOLUTION)}
    assert {"down_1.weight", "encoder.2.blocks.0.first.weight", "auxiliary_heads.0.weight"} <= changed


def test_a_gate_that_is_shut_over_a_lesion_still_learns_to_open() -> None:
    truth = torch.full((1, 1, 4, 4, 4), 0.15)
    ones, none = torch.ones_like(truth), torch.zeros_like(truth)
    gate = torch.full_like(truth, -6.0, requires_grad=True)
    (through_the_signal,) = torch.autograd.grad(loss(torch.sigmoid(gate) * 0.15, ones, truth, ones, none), gate)
    (as_a_classifier,) = torch.autograd.grad(gate_loss(gate, truth, ones, none), gate)
    assert as_a_classifier.max() < 20 * through_the_signal.min() < 0  # both say open, the first in earnest


def test_the_gate_is_judged_where_the_brain_enhances_or_is_quiet_and_nowhere_else() -> None:
    truth = torch.zeros(1, 1, 4, 4, 4)
    truth[..., :2] = 0.2
    brain, quiet = torch.ones_like(truth), torch.zeros_like(truth)
    brain[:, :, :2] = 0
    quiet[:, :, 2:, :, 3:] = 1
    gate = torch.zeros_like(truth, requires_grad=True)
    (slope,) = torch.autograd.grad(gate_loss(gate, truth, brain, quiet), gate)
    assert torch.equal(slope < 0, (brain > 0) & (truth > 0))
    assert torch.equal(slope > 0, quiet > 0)


def test_what_the_bound_takes_away_still_costs() -> None:
    truth = torch.full((1, 1, 4, 4, 4), 0.5)
    ones, none = torch.ones_like(truth), torch.zeros_like(truth)
    assert loss(truth * 2, truth, truth, ones, none).item() > 0.01  # clamped it is the truth


def test_a_patch_is_a_turned_and_flipped_piece_of_its_block_with_the_spacing_of_its_axes() -> None:
    sides, spacing_kji = (48, 40, 44), (3.0, 1.0, 0.5)
    places = np.stack(np.meshgrid(*(np.arange(n) / 64 for n in sides), indexing="ij")).astype(np.float16)  # exact
    half = places[0] > 0.3
    condition = np.zeros(len(NAMES), np.float32)
    at = [NAMES.index(f"log_spacing_{axis}") for axis in "kji"]
    condition[at] = np.log(spacing_kji)
    held = Held(Block(places, places[0], half, ~half, condition), torch.device("cpu"))
    turns = set()
    for seed in range(20):
        layers, seen = held.patch(24, np.random.default_rng(seed))
        patch = layers.float().numpy()
        assert patch.shape == (6, 24, 24, 24)
        steps = [[np.diff(patch[of], axis=axis).mean() * 64 for axis in range(3)] for of in range(3)]
        assert np.allclose(np.abs(steps).sum(axis=0), 1)  # each axis of the patch is one of the block
        came_from = np.abs(steps).argmax(axis=0)
        assert np.allclose(np.exp(seen[at]), np.array(spacing_kji)[came_from])
        assert np.array_equal(patch[3], patch[0])
        assert np.array_equal(patch[4], patch[0] > 0.3)
        assert np.array_equal(patch[5], patch[0] <= 0.3)
        turns.add((*came_from, *np.sign(np.sum(steps, axis=0))))
    assert len(turns) > 10


def test_gaps_of_a_header_take_what_follows_from_it_with_them() -> None:
    sample = make_sample(3, shape=(40, 40, 40))
    assert sample is not None
    held = [Held(sample, torch.device("cpu"))]
    known = {name: NAMES.index(name) for name in NAMES if name.endswith("_known")}
    drawn = draw_batch(held, 400, 8, np.random.default_rng(0))[1].numpy()
    no_field, no_dose = drawn[:, known["field_known"]] == 0, drawn[:, known["dose_known"]] == 0
    no_class = drawn[:, [NAMES.index(name) for name in SEQUENCE_NAMES]].sum(axis=1) == 0
    for gap, follows in ((no_field, "agent_known"), (no_dose, "agent_known"), (no_class, "repetition_time_known")):
        assert 0.05 < gap.mean() < 0.2
        assert not drawn[gap, known[follows]].any()


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


def test_an_evaluation_counts_and_replaces_what_the_quality_gate_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    (usable, following), before = usable_studies(2, side=40)
    make = evaluate.make_test_sample

    def moved(seed: int, *arguments: Any) -> Sample | None:
        sample = make(seed, *arguments)
        return replace(sample, figures=(motion_of(3.0),)) if sample and seed == usable else sample

    monkeypatch.setattr(evaluate, "make_test_sample", moved)
    replaced, refused = usable_studies(1, side=40)
    assert ([*replaced], refused) == ([following], before + 1)


def test_training_takes_no_pair_that_the_quality_gate_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_sample(3, shape=(40, 40, 40)) is not None
    monkeypatch.setattr(scanner, "_misalign", lambda image, *_: ndimage.shift(image, (0, 2, 0), order=1))
    assert make_sample(3, shape=(40, 40, 40)) is None


def motion_of(mm: float) -> Figure:
    return LIMITS["residual_motion"].judge("residual_motion", mm)


def test_held_out_studies_have_the_asked_dose_and_are_the_same_every_time() -> None:
    studies, _ = usable_studies(2, side=40)
    (_, sample), *_ = studies.items()
    one, again = (held_out([*studies], 0.1, side=40) for _ in range(2))
    (same, _) = held_out([*studies], JUDGED_DOSE, side=40)
    assert np.array_equal(sample.images, same.images)
    assert [sample.scenario.dose_fraction for sample in one] == [0.1, 0.1]
    assert all(np.array_equal(a.images, b.images) for a, b in zip(one, again, strict=True))
