"""What the network makes of its inputs: conditions shuffled or removed, the subtraction removed, and its embedding.

Hides which numbers of the conditioning vector belong together. Must never change a sample in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.agents import AGENTS
from models.condition import MEASURED, NAMES, SEQUENCE_NAMES, TIMING_NAMES, Conditions, vector
from models.training.samples import Sample
from models.volume import Array

GROUPS: dict[str, tuple[str, ...]] = {
    "field strength": ("field", "field_known"),
    "dose": ("log_dose_fraction", "dose_known"),
    "agent": ("log_effective_dose", "relaxivity", "agent_known"),
    "noise": ("log_sigma", "log_noise_left_1", "log_noise_left_2", "log_noise_left_3"),
    "spacing": ("log_spacing_i", "log_spacing_j", "log_spacing_k"),
    "sequence": SEQUENCE_NAMES,
    "timing": TIMING_NAMES,
    "sequence and timing": (*SEQUENCE_NAMES, *TIMING_NAMES),
}


_NOISE_LEFT = (0.35, 0.25, 0.15)  # of slightly correlated noise


def ablations(samples: Sequence[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    """(What was done, the changed samples), one after the other."""
    for name, members in [*GROUPS.items(), ("all conditions", NAMES)]:
        yield f"{name} shuffled", _shuffled(samples, members)
    for name, members in [*GROUPS.items(), ("all conditions", NAMES)]:
        if not {*members} <= {*MEASURED}:  # measured: never unknown, and 0 would mean another value
            yield f"{name} unknown", _unknown(samples, members)
    keep = np.array([0, 1, 1], np.float16)[:, None, None, None]
    yield "subtraction removed", [replace(sample, images=sample.images * keep) for sample in samples]


def _shuffled(samples: Sequence[Sample], members: Sequence[str]) -> list[Sample]:
    """Every sample takes these values from another one; the order is seeded and leaves none in its place."""
    order = np.random.default_rng(0).permutation(len(samples))
    donor = {int(order[n]): int(order[n - 1]) for n in range(len(order))}
    at = [NAMES.index(name) for name in members]
    return [_with(sample, at, samples[donor[n]].condition[at]) for n, sample in enumerate(samples)]


def _unknown(samples: Sequence[Sample], members: Sequence[str]) -> list[Sample]:
    at = [NAMES.index(name) for name in members if name not in MEASURED]
    return [_with(sample, at, np.zeros(len(at), np.float32)) for sample in samples]


def _with(sample: Sample, at: list[int], values: Array) -> Sample:
    condition = sample.condition.copy()
    condition[at] = values
    return replace(sample, condition=condition)


def condition_grid() -> tuple[list[Conditions], Array]:
    """Acquisitions over field strength, agent and dose, all else equal, and their vectors (n, len(NAMES))."""
    grid = [
        Conditions(
            field, agent.name, dose * agent.standard_dose_mmol_per_kg, "MPRAGE", 0.03, _NOISE_LEFT, (1.0, 1.0, 1.0)
        )
        for field in (1.5, 3.0)
        for agent in AGENTS
        for dose in (0.1, 0.2, 0.25, 0.33, 0.5)
    ]
    return grid, np.stack([vector(one) for one in grid])


def embedding(model: Path, vectors: Array) -> Array:
    """The embedding that an exported network computes from conditioning vectors.

    Args:
        model: model.onnx.
        vectors: (n, len(NAMES)).

    Returns:
        (n, width of the embedding).
    """
    import onnx  # noqa: PLC0415  evaluation alone needs it

    weights = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(model).graph.initializer}
    vectors = vectors[:, : weights["embed.0.weight"].shape[1]]  # a network may take only the first of them
    for layer in ("embed.0", "embed.2"):
        linear = vectors @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        vectors = linear / (1 + np.exp(-linear))
    return vectors


def variance_shares(grid: Sequence[Conditions], embedded: Array) -> dict[str, float]:
    """Share of the embedding's variance over the grid that each variable explains alone (main effects)."""
    total = float(embedded.var(axis=0).sum())
    shares = {}
    for name in ("field_strength_t", "agent", "dose_fraction"):
        keys = [getattr(one, name) for one in grid]
        keys = [round(key, 4) if isinstance(key, float) else key for key in keys]
        means = np.stack([embedded[[k == key for k in keys]].mean(axis=0) for key in keys])
        shares[name] = float(means.var(axis=0).sum()) / total if total > 1e-9 else 0.0
    return shares
