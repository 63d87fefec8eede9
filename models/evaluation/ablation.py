"""What the network makes of its inputs: conditions shuffled or removed, the subtraction removed, and its embedding.

Hides what belongs together in what a network is told. Must never change a sample in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from models.agents import AGENTS, BY_NAME
from models.condition import TIMING_FIELDS, Conditions, vector
from models.simulation.samples import Sample
from models.volume import Array

GROUPS: dict[str, tuple[str, ...]] = {  # fields of Conditions; what follows from them changes with them
    "field strength": ("field_strength_t",),
    "dose": ("dose_mmol_per_kg",),
    "agent": ("agent",),
    "noise": ("sigma", "noise_left"),
    "spacing": ("spacing_mm",),
    "sequence": ("sequence",),
    "timing": TIMING_FIELDS,
    "sequence and timing": ("sequence", *TIMING_FIELDS),
}
UNKNOWN: dict[str, tuple[str, ...]] = {  # what a header can lack: the dose fraction needs both, timing the class
    "field strength": GROUPS["field strength"],
    "dose or agent": (*GROUPS["dose"], *GROUPS["agent"]),
    "sequence": GROUPS["sequence and timing"],
    "timing": GROUPS["timing"],
}
_NOISE_LEFT = (0.35, 0.25, 0.15)  # of slightly correlated noise


def ablations(samples: Sequence[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    """(What was done, the changed samples), one after the other; first nothing, for comparison.

    Shuffled: told another study's value; another agent at the same share of its own standard dose; timing of another
    study of the same sequence class; another class with its own timing, most of which that class was not trained on,
    and so is unknown. Unknown: told what inference tells where a header lacks it.
    """
    yield "nothing", list(samples)
    everything = tuple(dict.fromkeys(name for names in GROUPS.values() for name in names))
    rest = tuple(name for name in everything if name not in GROUPS["dose"])
    for group, names in [*GROUPS.items(), ("all but the dose", rest), ("all conditions", everything)]:
        yield f"{group} shuffled", _shuffled(samples, names)
    headers = tuple(name for names in UNKNOWN.values() for name in names)
    for group, names in [*UNKNOWN.items(), ("all conditions", headers)]:
        yield f"{group} unknown", [_told(sample, dict.fromkeys(names)) for sample in samples]
    keep = np.array([0, 1, 1], np.float16)[:, None, None, None]
    yield "subtraction removed", [replace(sample, images=sample.images * keep) for sample in samples]


def _shuffled(samples: Sequence[Sample], names: Sequence[str]) -> list[Sample]:
    """Every sample is told these of another one, where there is one; the order is seeded."""
    order = np.random.default_rng(0).permutation(len(samples))
    in_class = tuple(names) == TIMING_FIELDS  # which mean something else in another
    circles: dict[str | None, list[int]] = {}  # within which values go from one to the next
    for n in map(int, order):
        circles.setdefault(samples[n].conditions.sequence if in_class else None, []).append(n)
    donor = {own: circle[place - 1] for circle in circles.values() for place, own in enumerate(circle)}
    return [_told_of(sample, samples[donor[n]].conditions, names) for n, sample in enumerate(samples)]


def _told_of(sample: Sample, other: Conditions, names: Sequence[str]) -> Sample:
    told = {name: getattr(other, name) for name in names}
    fraction = (other if "dose_mmol_per_kg" in told else sample.conditions).dose_fraction
    agent = told.get("agent", sample.conditions.agent)
    if fraction is not None and agent is not None:
        told["dose_mmol_per_kg"] = fraction * BY_NAME[agent].standard_dose_mmol_per_kg
    return _told(sample, told)


def _told(sample: Sample, told: Mapping[str, Any]) -> Sample:
    conditions = replace(sample.conditions, **told)
    return replace(sample, conditions=conditions, condition=vector(conditions))


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
