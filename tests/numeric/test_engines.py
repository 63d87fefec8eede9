"""Engines: the bound, tiles, guards, and what a model folder must satisfy to be loaded."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from models.card import DEFAULT_MODEL, ZOO, ModelError, read_card
from models.condition import DOSE_INDEX, HEADROOM, NAMES, UNKNOWN_DOSE_FRACTION, Conditions, vector
from models.preprocess import FractionDone
from models.quality import Verdict, judge_conditions
from models.runtime import (
    CUDA,
    LinearEngine,
    NetworkEngine,
    OutputError,
    UnknownDoseError,
    at_dose,
    choose_precision,
    upper_bound,
)
from models.volume import Array
from tests.numeric.phantoms import conditions, head, prepared_head

MODEL = ZOO / DEFAULT_MODEL


@pytest.fixture(scope="module")
def engine() -> NetworkEngine:
    return NetworkEngine(MODEL)


def measured_uptake(subtraction: Array) -> Array:
    """The largest of the subtraction and its three smoothings: binomial, twice, and once more twice as wide."""
    kernel = np.array([0.25, 0.5, 0.25])
    wide_kernel = np.array([0.25, 0.0, 0.5, 0.0, 0.25])

    def blur(volume: Array, taps: np.ndarray) -> Array:
        for axis in range(3):
            volume = ndimage.convolve1d(volume, taps, axis, mode="nearest")
        return volume

    once = blur(subtraction, kernel)
    twice = blur(once, kernel)
    return np.maximum.reduce([subtraction, once, twice, blur(twice, wide_kernel), np.zeros_like(subtraction)])


@given(
    seed=st.integers(0, 10_000),
    level=st.floats(-1.0, 3.0),
    spread=st.floats(0.0, 2.0),
    dose=st.one_of(st.none(), st.floats(0.05, 1.0)),
    nuisance=st.floats(-3.0, 3.0),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_signal_never_exceeds_the_bound_whatever_the_input(
    engine: NetworkEngine, *, seed: int, level: float, spread: float, dose: float | None, nuisance: float
) -> None:
    rng = np.random.default_rng(seed)
    images = rng.normal(level, spread, (3, 16, 20, 12)).astype(np.float32)
    condition = vector(conditions(None if dose is None else dose * 0.1)) + np.float32(0)
    known = {DOSE_INDEX, DOSE_INDEX + 1}
    for index in set(range(len(NAMES))) - known:
        condition[index] += rng.normal(0, abs(nuisance))
    signal = engine.run(images, condition)
    bound = HEADROOM / (dose or UNKNOWN_DOSE_FRACTION) * measured_uptake(images[0].astype(np.float64))
    assert signal.min() >= 0
    assert (signal <= bound * (1 + 1e-4) + 1e-4).all()


def test_there_is_no_enhancement_where_no_uptake_was_measured(engine: NetworkEngine) -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 2, (3, 24, 24, 24)).astype(np.float32)
    images[0] = -np.abs(images[0])
    images[0, :4] = 1.0  # uptake far away
    signal = engine.run(images, vector(conditions()))
    assert signal[:4].max() > 0
    assert np.count_nonzero(signal[9:]) == 0  # smoothing reaches 4 voxels


def test_a_higher_dose_never_raises_the_bound(engine: NetworkEngine) -> None:
    images = np.full((3, 8, 8, 8), 0.4, np.float32)
    for low, high in ((0.05, 0.1), (0.1, 0.33), (0.33, 0.9)):
        assert HEADROOM / high * 0.4 < HEADROOM / low * 0.4
        assert engine.run(images, vector(conditions(high * 0.1))).max() <= HEADROOM / high * 0.4 + 1e-5


def test_tiles_and_the_whole_volume_agree(engine: NetworkEngine) -> None:
    rng = np.random.default_rng(1)
    images = ndimage.gaussian_filter(rng.normal(0.1, 0.5, (3, 30, 41, 173)), (0, 1, 1, 1)).astype(np.float32)
    whole = engine.run(images, vector(conditions()))
    tiled_engine = NetworkEngine(MODEL, memory_bytes=90 << 20)
    tiles = list(tiled_engine.tiles((32, 44, 176)))
    assert len(tiles) > 1
    tiled = tiled_engine.run(images, vector(conditions()))
    assert np.abs(whole - tiled).max() < 1e-5


def test_a_lesion_in_a_phantom_is_predicted_and_quiet_brain_stays_quiet(engine: NetworkEngine) -> None:
    phantom, prepared = head(stripped=True), prepared_head(stripped=True)
    signal = prepared.signal_on_pre(engine.predict(prepared, conditions())) / prepared.scale
    lesion = (phantom.lesion_labels > 0) & (phantom.enhancement > 0.3)
    quiet = ndimage.distance_transform_edt(phantom.enhancement < 0.01) > 3
    assert 0.5 < signal[lesion].mean() / phantom.enhancement[lesion].mean() < 1.4
    assert signal[quiet & phantom.brain].mean() < 0.02


def test_the_linear_engine_divides_by_the_dose_and_needs_it() -> None:
    prepared = prepared_head(stripped=True)
    half, full = (LinearEngine().predict(prepared, conditions(dose)) for dose in (0.05, 0.1))
    assert half.max() == pytest.approx(2 * full.max(), rel=1e-5)
    with pytest.raises(UnknownDoseError):
        LinearEngine().predict(prepared, conditions(None))


@pytest.mark.parametrize(("fraction", "verdict"), [(0.33, Verdict.PASS), (0.04, Verdict.WARN), (0.02, Verdict.REFUSE)])
def test_a_dose_far_below_what_was_trained_is_refused(fraction: float, verdict: Verdict) -> None:
    figures = {figure.name: figure.verdict for figure in judge_conditions(conditions(fraction * 0.1))}
    assert figures["dose_fraction"] is verdict


def test_a_network_without_the_bound_is_caught() -> None:
    prepared = prepared_head(stripped=True)

    class Unbounded(NetworkEngine):
        """As a site might bring it: paints everywhere."""

        def run(self, images: Array, condition: Array, progress: FractionDone = lambda _: None) -> Array:
            return np.full(images.shape[1:], 0.5, np.float32)

    assert NetworkEngine(MODEL).predict(prepared, conditions()).max() > 0  # the bundled one passes the same check
    with pytest.raises(OutputError, match="bound"):
        Unbounded(MODEL).predict(prepared, conditions())


def test_unknown_values_are_passed_as_unknown_and_never_as_a_default() -> None:
    nothing = vector(Conditions(None, None, None, None, 0.03, (0.35, 0.25, 0.15), (1.0, 1.0, 1.0)))
    known = [name for name in NAMES if name.endswith("known")]
    assert [nothing[NAMES.index(name)] for name in known] == [0.0] * len(known)
    assert not nothing[[NAMES.index(f"sequence_{name}") for name in ("spgr", "mprage", "se")]].any()


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_an_altered_network_is_refused_at_load(model_copy: Path) -> None:
    path = model_copy / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ModelError, match="SHA-256"):
        read_card(model_copy)


@pytest.mark.parametrize("name", ["contract", "opset"])
def test_a_model_of_another_contract_or_opset_is_refused(model_copy: Path, name: str) -> None:
    card = model_copy / "card.toml"
    card.write_text(re.sub(f"^{name} = .*$", f"{name} = 1", card.read_text(), flags=re.MULTILINE))
    with pytest.raises(ModelError, match=name):
        NetworkEngine(model_copy)


@pytest.mark.parametrize("name", ["contract", "opset"])
@pytest.mark.parametrize("value", ["1", None], ids=["another", "none"])
def test_a_network_that_says_another_contract_or_opset_than_its_card_is_refused(
    model_copy: Path, name: str, value: str | None
) -> None:
    import onnx

    network = onnx.load(model_copy / "model.onnx")
    said = {one.key: one.value for one in network.metadata_props} | {name: value}
    onnx.helper.set_model_props(network, {key: text for key, text in said.items() if text is not None})
    onnx.save(network, model_copy / "model.onnx")
    sign(model_copy)
    with pytest.raises(ModelError, match=f"{name} is {value}"):
        NetworkEngine(model_copy)


def test_a_folder_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="incomplete"):
        NetworkEngine(tmp_path)


def test_a_card_without_its_network_is_refused(model_copy: Path) -> None:
    (model_copy / "model.onnx").unlink()
    with pytest.raises(ModelError, match="incomplete"):
        read_card(model_copy)


@pytest.mark.parametrize(
    "card",
    [b"id = ", b"\xff\xfe", b'id = "a"\n', (MODEL / "card.toml").read_bytes() + b"another = 1\n"],
    ids=["no TOML", "no UTF-8", "too few fields", "an unknown field"],
)
def test_a_card_that_cannot_be_read_is_refused(model_copy: Path, card: bytes) -> None:
    (model_copy / "card.toml").write_bytes(card)
    with pytest.raises(ModelError, match="incomplete"):
        read_card(model_copy)


def test_a_halo_that_would_cut_tiles_between_the_strides_is_refused(model_copy: Path) -> None:
    card = model_copy / "card.toml"
    card.write_text(card.read_text().replace("halo_voxels = 60", "halo_voxels = 54"))
    with pytest.raises(ModelError, match="54 is no multiple of the stride 4"):
        read_card(model_copy)


def test_a_card_that_does_not_say_what_the_model_was_trained_on_is_refused(model_copy: Path) -> None:
    path = model_copy / "card.toml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join('training_data = " "\n' if line.startswith("training_data") else line for line in lines))
    with pytest.raises(ModelError, match="trained on"):
        read_card(model_copy)
    path.write_text("".join(line for line in lines if not line.startswith("training_data")))
    with pytest.raises(ModelError, match="incomplete"):
        read_card(model_copy)


@pytest.fixture
def half_copy(model_copy: Path) -> Path:
    """The bundled model with a half-precision network beside it."""
    import onnx

    from models.training.export import halved

    (model_copy / "model-fp16.onnx").write_bytes(halved(onnx.load(model_copy / "model.onnx")).SerializeToString())
    digest = hashlib.sha256((model_copy / "model-fp16.onnx").read_bytes()).hexdigest()
    lines = [
        line
        for line in (model_copy / "card.toml").read_text().splitlines()
        if not line.startswith(("sha256_fp16", "parity_fp16"))
    ]
    (model_copy / "card.toml").write_text("\n".join([*lines, f'sha256_fp16 = "{digest}"', "parity_fp16 = 0.001", ""]))
    return model_copy


def test_an_altered_or_missing_half_precision_network_is_refused_where_the_card_offers_one(half_copy: Path) -> None:
    path = half_copy / "model-fp16.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ModelError, match=r"model-fp16.onnx has SHA-256"):
        read_card(half_copy)
    path.unlink()
    with pytest.raises(ModelError, match="incomplete"):
        read_card(half_copy)


def test_half_precision_is_chosen_only_under_cuda_and_only_where_the_card_offers_it(half_copy: Path) -> None:
    offers = read_card(half_copy)
    offers_none = replace(offers, sha256_fp16=None)
    assert choose_precision(offers, CUDA) == "fp16"
    assert choose_precision(offers, "CPUExecutionProvider") == "fp32"
    assert choose_precision(offers_none, CUDA) == "fp32"


def test_the_digest_of_an_engine_is_that_of_the_network_it_runs(half_copy: Path) -> None:
    engine = NetworkEngine(half_copy, threads=1)
    path, digest = engine.card.networks[engine.precision]
    assert engine.precision == choose_precision(engine.card, engine.provider)
    assert engine.digest == digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len({digest for _, digest in engine.card.networks.values()}) == 2


def test_what_is_not_a_network_is_refused(model_copy: Path) -> None:
    (model_copy / "model.onnx").write_bytes(b"nothing")
    sign(model_copy)
    with pytest.raises(ModelError, match="cannot load"):
        NetworkEngine(model_copy)


def sign(folder: Path) -> None:
    """Let the card state the digest of the network as it is."""
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    lines = (folder / "card.toml").read_text().splitlines(keepends=True)
    signed = [f'sha256 = "{digest}"\n' if line.startswith("sha256 ") else line for line in lines]
    (folder / "card.toml").write_text("".join(signed))


def test_another_dose_is_in_proportion_and_never_beyond_the_bound() -> None:
    prepared = prepared_head(stripped=True)
    signal = LinearEngine().predict(prepared, conditions())
    assert at_dose(signal, prepared, conditions(), 1.0) is signal
    assert np.allclose(at_dose(signal, prepared, conditions(), 0.5), signal / 2)
    bound = upper_bound(prepared.comparison.subtraction, conditions().dose_fraction)
    more = at_dose(signal, prepared, conditions(), HEADROOM)
    assert (more >= signal).all()
    assert (more <= np.maximum(bound, signal)).all()
    assert (more > signal).any()
