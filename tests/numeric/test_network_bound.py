"""The bound of the network's output, whatever the weights and whatever the input.

Three networks are asked: the bundled one as ONNX, an untrained one, and ones whose weights were thrown away: multiplied
by normal numbers of standard deviation 3, and normal numbers where they start at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from models.card import DEFAULT_MODEL, ZOO
from models.condition import DOSE_INDEX, DOSE_KNOWN_INDEX, HEADROOM, NAMES, UNKNOWN_DOSE_FRACTION
from models.runtime import NetworkEngine, upper_bound
from models.simulation.samples import make_sample
from models.training.network import VARIANTS, Network
from models.volume import Array

SHAPE = (12, 16, 8)
Run = Callable[[Array, Array], Array]


def torch_run(network: Network) -> Run:
    def run(images: Array, condition: Array) -> Array:
        with torch.no_grad():
            signal: Array = network(torch.from_numpy(images)[None], torch.from_numpy(condition)[None])[0, 0].numpy()
        return signal

    return run


def perturbed(seed: int) -> Network:
    torch.manual_seed(seed)
    network = Network(VARIANTS["small"])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3 * torch.randn_like(parameter))
            parameter[parameter == 0] = torch.randn(int((parameter == 0).sum())) * 0.3
    return network.eval()


ENGINE = NetworkEngine(ZOO / DEFAULT_MODEL, threads=1)
NETWORKS: dict[str, Run] = {
    "bundled": ENGINE.run,
    "untrained": torch_run(Network(VARIANTS["small"]).eval()),
    **{f"perturbed {seed}": torch_run(perturbed(seed)) for seed in range(3)},
}
every_network = pytest.mark.parametrize("run", NETWORKS.values(), ids=NETWORKS.keys())


def noise(rng: np.random.Generator) -> Array:
    """Noise in all images, of any strength."""
    return rng.normal(rng.uniform(-1, 2), 10 ** rng.uniform(-3, 1), (3, *SHAPE))


def spikes(rng: np.random.Generator) -> Array:
    """Single voxels far beyond anything, of either sign, on nothing."""
    images = np.zeros((3, *SHAPE))
    images[1:] = [[[[1.0]]], [[[0.03]]]]
    for _ in range(4):
        images[0][tuple(rng.integers(SHAPE))] = rng.choice([-1, 1]) * 10 ** rng.uniform(-2, 3)
    return images


def huge_pre(rng: np.random.Generator) -> Array:
    """A pre-contrast image that is not in units of white matter."""
    images = np.abs(rng.normal(0.1, 0.1, (3, *SHAPE)))
    images[1] *= 10 ** rng.uniform(2, 5)
    return images


def extreme_sigma(rng: np.random.Generator) -> Array:
    """A noise map of zeros, or a thousand times white matter, or both side by side."""
    images = rng.normal(0.1, 0.1, (3, *SHAPE))
    images[2] = rng.choice([0.0, 1e-6, 1e3], SHAPE) if rng.uniform() < 0.5 else rng.choice([0.0, 1e3])
    return images


def nothing(_: np.random.Generator) -> Array:
    """No image at all."""
    return np.zeros((3, *SHAPE))


INPUTS = (noise, spikes, huge_pre, extreme_sigma, nothing)


def any_condition(dose: float | None, nuisance: float, rng: np.random.Generator) -> Array:
    """A dose, and anything at all in what else is stated."""
    condition = rng.normal(0, nuisance, len(NAMES)).astype(np.float32)
    condition[DOSE_INDEX] = 0.0 if dose is None else math.log(dose)
    condition[DOSE_KNOWN_INDEX] = float(dose is not None)
    return condition


def measured_uptake(subtraction: Array) -> Array:
    """The largest of the subtraction and its smoothings, in double precision; may be negative."""

    def blur(volume: Array, taps: list[float]) -> Array:
        for axis in range(3):
            volume = ndimage.convolve1d(volume, taps, axis, mode="nearest")
        return volume

    once = blur(subtraction.astype(np.float64), [0.25, 0.5, 0.25])  # type: ignore[arg-type]
    twice = blur(once, [0.25, 0.5, 0.25])
    wide = blur(twice, [0.25, 0.0, 0.5, 0.0, 0.25])
    return np.maximum.reduce([subtraction, once, twice, wide])


doses = st.one_of(st.none(), st.floats(0.02, 1.0))
seeds = st.integers(0, 1_000_000)


@every_network
@given(make=st.sampled_from(INPUTS), seed=seeds, dose=doses, nuisance=st.floats(0.0, 5.0))
@settings(max_examples=30, deadline=None)
def test_no_input_makes_any_network_exceed_the_bound(
    run: Run, make: Callable[[np.random.Generator], Array], seed: int, dose: float | None, nuisance: float
) -> None:
    rng = np.random.default_rng(seed)
    images = make(rng).astype(np.float32)
    signal = run(images, any_condition(dose, nuisance, rng))
    measured = measured_uptake(images[0])
    amplification = HEADROOM / (dose or UNKNOWN_DOSE_FRACTION)
    rounding = 1e-5 * amplification * float(np.abs(images[0]).max())
    assert np.isfinite(signal).all()
    assert signal.min() >= 0
    assert (signal <= amplification * np.maximum(measured, 0) + rounding).all()
    assert signal[measured <= 0].max(initial=0.0) <= rounding
    assert (signal <= upper_bound(images[0], dose) + rounding).all()  # what is checked again at run time


@every_network
@given(seed=seeds, dose=doses, size=st.floats(1e-4, 1e3))
@settings(max_examples=20, deadline=None)
def test_where_contrast_only_took_signal_away_no_network_adds_any(
    run: Run, seed: int, dose: float | None, size: float
) -> None:
    rng = np.random.default_rng(seed)
    images = np.abs(rng.normal(0, 1, (3, *SHAPE))).astype(np.float32)
    images[0] *= -np.float32(size)
    assert np.count_nonzero(run(images, any_condition(dose, 2.0, rng))) == 0


@given(seed=seeds, one=st.floats(0.02, 1.0), other=st.floats(0.02, 1.0))
@settings(max_examples=30, deadline=None)
def test_a_larger_dose_never_raises_the_bound(seed: int, one: float, other: float) -> None:
    rng = np.random.default_rng(seed)
    images = noise(rng).astype(np.float32)
    smaller, larger = sorted((one, other))
    network = perturbed(0)
    bounds = []
    for dose in (smaller, larger):
        condition = torch.from_numpy(any_condition(dose, 2.0, rng))[None]
        with torch.no_grad():
            bounds.append(network.unbounded(torch.from_numpy(images)[None], condition)[1].numpy()[0, 0])
    assert (bounds[1] <= bounds[0] * (1 + 1e-6)).all()
    assert (upper_bound(images[0], larger) <= upper_bound(images[0], smaller)).all()


@pytest.mark.parametrize("seed", [3, 8])
def test_the_same_uptake_from_a_larger_stated_dose_never_means_more_signal(seed: int) -> None:
    sample = make_sample(700_000_000 + seed, shape=(48, 48, 48))
    assert sample is not None
    totals = []
    for dose in (0.1, 0.2, 0.33, 0.5, 1.0):
        condition = sample.condition.copy()
        shift = math.log(dose / sample.scenario.dose_fraction)
        condition[[DOSE_INDEX, NAMES.index("log_effective_dose")]] += np.float32(shift)
        totals.append(float(ENGINE.run(sample.images.astype(np.float32), condition)[sample.brain].sum()))
    assert totals[-1] > 0
    assert totals == sorted(totals, reverse=True)
