"""The quality gate: are these two volumes the same head and sequence, and is the signal believable?

Hides how each figure is measured. The limits of all of them stand in one table, `LIMITS`, with what they mean and where
they come from; `render_table` writes it into the conformance statement. Must never stop a study without a figure and a
reason, and never measure without a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from math import inf
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from models.brain import BRAIN_LIMITS
from models.condition import TRAINED, Conditions, told_timing
from models.preprocess import SUPPORT_MM, Comparison, Prepared
from models.runtime import upper_bound
from models.statistics import ENHANCING, robust_std
from models.volume import Array, Mask


class Verdict(Enum):
    """What a figure says, from good to bad."""

    PASS = "pass"  # noqa: S105  the good verdict, not a password
    WARN = "warn"
    REFUSE = "refuse"


class Gate(Enum):
    """What is in question where a figure refuses."""

    PAIR = "the pair"
    ORDER = "the order of the pair"
    CONDITIONS = "the acquisition"
    OUTPUT = "the result"


@dataclass(frozen=True)
class Figure:
    """One measured figure and what it says: a row of the report."""

    name: str
    value: float
    unit: str  # UCUM; "1" where there is none
    verdict: Verdict
    reason: str  # what is measured, and what was expected

    def __str__(self) -> str:
        """For a person who has to look."""
        return f"{self.name} is {self.value:g} ({self.reason})"

    def row(self) -> dict[str, Any]:
        """As reports keep it: name, value, unit, verdict, reason."""
        return asdict(self) | {"verdict": self.verdict.value}


Range = tuple[float, float]


@dataclass(frozen=True)
class Limit:
    """The range that passes, the range that is still worked on with a warning, and why."""

    gate: Gate
    unit: str
    passes: Range
    works: Range
    meaning: str
    origin: str

    def judge(self, name: str, value: float) -> Figure:
        """A value outside both ranges, or not finite, refuses."""
        good, usable = (low <= value <= high for low, high in (self.passes, self.works))
        verdict = Verdict.PASS if good else Verdict.WARN if usable else Verdict.REFUSE
        reason = f"{self.meaning}; {said(self.passes)} passes, {self.origin}"
        return Figure(name, round(float(value), 5), self.unit, verdict, reason)


def said(limits: Range) -> str:
    """A range in words."""
    low, high = limits
    if low == high:
        return f"{low:g}"
    if high == inf:
        return f"{low:g} or more"
    return f"up to {high:g}" if low in {0, -inf} else f"{low:g} to {high:g}"


def _least(passes: float, works: float) -> tuple[Range, Range]:
    return (passes, inf), (works, inf)


def _most(passes: float, works: float) -> tuple[Range, Range]:
    return (-inf, passes), (-inf, works)


def _trained(name: str) -> tuple[Range, Range]:
    """A factor of two outside what the simulator draws is still worked on."""
    low, high = TRAINED[name]
    return (low, high), (low / 2, 2 * high)


_SIMULATOR = "what the training covered; a factor of two outside is still worked on"

# What grey matter changes by, white matter = 1, for a relative change of a time or angle: derivatives of the signal
# equations (models.simulation.physics) for typical protocols, the larger of 1.5 and 3 T. The echo time's is < .02.
SENSITIVITY: dict[str, dict[str, float]] = {
    "SPGR": {"RepetitionTime": 0.08, "FlipAngle": 0.15},
    "MPRAGE": {"RepetitionTime": 0.35, "InversionTime": 0.36, "FlipAngle": 0.28},
    "SE": {"RepetitionTime": 0.10},
}

LIMITS: dict[str, Limit] = {
    "sequence_class": Limit(
        Gate.PAIR, "1", (0, 0), (0, 0),
        "1 where the headers state two classes of SPGR, MPRAGE and SE",
        "by the signal equations grey matter, white matter = 1, is 0.1 darker or more in MPRAGE than in both others at "
        "3 T; a spin echo shows vessels and the agent otherwise than a gradient echo",
    ),
    "timing_change": Limit(
        Gate.PAIR, "1", *_most(0.05, 0.10),
        "largest relative change of repetition, echo or inversion time or flip angle in the headers",
        "chosen: a protocol that is repeated keeps them but for the shortest times, which scanners fit to each series",
    ),
    "contrast_change": Limit(
        Gate.PAIR, "1", *_most(0.02, 0.035),
        "change of grey matter, white matter = 1, that follows from those changes without any contrast agent",
        "signal equations; at a third of the dose 0.035 is amplified to "
        f"{ENHANCING:g}, from where on enhancement counts",
    ),
    "pair_correlation": Limit(
        Gate.PAIR, "1", *_least(0.88, 0.80),
        "correlation of pre-contrast and low dose, smoothed by 1.5 mm, in brain that does not enhance",
        "like sequences of real pairs measured .87 to .95, unlike ones .57 to .69",
    ),
    "residual_contrast": Limit(
        Gate.PAIR, "1", *_most(0.12, 0.20),
        "tissue contrast left in the subtraction where nothing enhances, less noise, over that of pre-contrast",
        "like pairs measured up to .10 (.16 in very noisy phantoms), MPRAGE against spin echo .15 to .34, "
        "a real pair with FLAIR-like, flatter or steeper contrast .21 to .28",
    ),
    "gain_field_sd": Limit(
        Gate.PAIR, "1", *_most(0.04, 0.10),
        "standard deviation of the gain field in the brain",
        "like real pairs measured .008 to .013, unlike ones .07 to .11",
    ),
    "residual_motion": Limit(
        Gate.PAIR, "mm", *_most(0.6, 0.95),
        "residual motion that was undone, 0.95 quantile in the brain",
        "chosen: a good rigid registration leaves less than 0.6, and at 1 mm it has failed (ADR 7)",
    ),
    "noise": Limit(
        Gate.PAIR, "1", (TRAINED["sigma"][0], 0.10), (0.0, 2 * TRAINED["sigma"][1]),
        "noise of the subtraction, white matter = 1",
        "training covered .011 to .115; less noise harms nobody, up to twice is still worked on",
    ),
    "brain_volume": Limit(
        Gate.PAIR, "mL", (700.0, 2400.0), (BRAIN_LIMITS["volume"].least, BRAIN_LIMITS["volume"].most),
        "volume of the brain found in the pre-contrast image",
        "brains with little of the fluid around them, real ones measured 1050 to 1550; simulated heads reach 2300",
    ),
    "brain_agreement": Limit(
        Gate.PAIR, "1", *_least(0.95, BRAIN_LIMITS["agreement"].least),
        "Dice of the two networks that find the brain",
        "real heads measured .956 and more, what is no brain mostly below .9 (ADR 24)",
    ),
    "brain_layers": Limit(
        Gate.PAIR, "1", *_least(0.35, BRAIN_LIMITS["layers"].least),
        "rank correlation of brightness with depth in the brain, which grey around white matter makes",
        "real heads measured .41 to .67, what the networks take for a brain and is none up to .25 (ADR 24)",
    ),
    "brain_in_pre": Limit(
        Gate.PAIR, "1", *_least(0.90, BRAIN_LIMITS["inside"].least),
        "share of the brain's surface that the border of the pre-contrast image does not cut",
        "whole heads measured .93 and more (ADR 24)",
    ),
    "brain_in_low": Limit(
        Gate.PAIR, "1", *_least(0.98, 0.90),
        "share of the brain found that the low-dose image covers",
        "what is not covered gets no signal: chosen, not measured",
    ),
    "darkening": Limit(
        Gate.ORDER, "1", *_most(0.001, 0.005),
        "share of the brain that clearly darkens less the share that brightens",
        "above 0 there is no contrast or the series have changed places",
    ),
    "field_strength": Limit(
        Gate.CONDITIONS, "T", *_trained("field_strength_t"), "magnetic field strength", _SIMULATOR
    ),
    "dose_fraction": Limit(
        Gate.CONDITIONS, "1", *_trained("dose_fraction"), "injected dose over the agent's standard dose", _SIMULATOR
    ),
    "spacing": Limit(
        Gate.CONDITIONS, "mm", *_trained("spacing_mm"), "largest spacing of the working grid", _SIMULATOR
    ),
    "timing_told": Limit(
        Gate.CONDITIONS, "1", *_least(1.0, 0.0),
        "share of repetition, echo and inversion time and flip angle that is known and lies within training",
        "a network is not told the rest, and is less exact at high enhancement; the linear engine uses none",
    ),
    "not_finite": Limit(
        Gate.OUTPUT, "1", (0, 0), (0, 0), "voxels of the signal that are not finite or negative", "none may be"
    ),
    "outside_support": Limit(
        Gate.OUTPUT, "1", (0, 0), (0, 0),
        f"voxels with signal further than {SUPPORT_MM:g} mm outside the brain", "none may be",
    ),
    "bound_use": Limit(
        Gate.OUTPUT, "1", *_most(1.0, 2.0),
        "largest signal over the bound that the measured uptake sets, away from the edges of the grid",
        "the network may not exceed 1 anywhere; the linear engine has no bound",
    ),
    "enhancing_fraction": Limit(
        Gate.OUTPUT, "1", *_most(0.20, 0.50),
        f"share of the brain predicted to enhance by more than {ENHANCING:g}",
        "chosen: more is no picture of a brain",
    ),
}  # fmt: skip


def judge_sequences(pre: str | None, low: str | None, changes: Mapping[str, float]) -> tuple[Figure, ...]:
    """Figures of the two sequences by their headers, before anything is computed; what is unknown has no figure.

    Args:
        pre: class of the pre-contrast sequence, a key of SENSITIVITY.
        low: class of the low-dose sequence.
        changes: relative change of each time and angle that both headers state, by keyword.
    """
    values = {}
    if pre and low:
        values["sequence_class"] = float(pre != low)
    if changes:
        values["timing_change"] = max(changes.values())
        values["contrast_change"] = max(
            sum(slope * changes.get(keyword, 0.0) for keyword, slope in slopes.items())
            for kind, slopes in SENSITIVITY.items()
            if pre is None or low is None or kind in {pre, low}
        )
    return _judged(values)


def judge_pair(prepared: Prepared) -> tuple[Figure, ...]:
    """Figures of the pair before inference: likeness, motion, noise, brain, coverage, order."""
    brain = prepared.brain
    correlation, residual = _likeness(prepared)
    return (
        *_judged({"pair_correlation": correlation, "residual_contrast": residual}),
        *judge_comparison(prepared.comparison, brain),
        *_judged(
            {
                "brain_volume": float(brain.sum()) * abs(float(np.linalg.det(prepared.pre.affine[:3, :3]))) / 1000,
                "brain_agreement": prepared.found["agreement"],
                "brain_layers": prepared.found["layers"],
                "brain_in_pre": prepared.found["inside"],
                "brain_in_low": _covered(prepared),
                "darkening": _darkening(prepared),
            }
        ),
    )


def judge_comparison(comparison: Comparison, brain: Mask) -> tuple[Figure, ...]:
    """Figures of an aligned pair by itself, a head or a part of one: gain field, motion, noise."""
    return _judged(
        {
            "gain_field_sd": float(comparison.gain_field[brain].std()),
            "residual_motion": comparison.motion_mm(brain),
            "noise": comparison.sigma,
        }
    )


def judge_conditions(conditions: Conditions) -> tuple[Figure, ...]:
    """Whether the acquisition lies inside what the network was trained on; what is unknown has no figure."""
    values = {
        "field_strength": conditions.field_strength_t,
        "dose_fraction": conditions.dose_fraction,
        "spacing": max(conditions.spacing_mm),
    }
    told = told_timing(conditions).values()
    values["timing_told"] = sum(value is not None for value in told) / len(told) if told else 0.0
    return _judged({name: value for name, value in values.items() if value is not None})


def judge_signal(signal: Array, prepared: Prepared, conditions: Conditions) -> tuple[Figure, ...]:
    """Figures of the predicted signal (working grid, white matter = 1), whichever engine made it."""
    bound = upper_bound(prepared.comparison.subtraction, conditions.dose_fraction)
    inner = tuple(slice(4, -4) if n > 16 else slice(None) for n in signal.shape)  # at edges a bound depends on padding
    return _judged(
        {
            "not_finite": float((~(signal >= 0) | ~np.isfinite(signal)).sum()),
            "outside_support": float(((signal != 0) & (prepared.support == 0)).sum()),
            "bound_use": float((signal / bound)[inner].max()),
            "enhancing_fraction": float((signal[prepared.brain] > ENHANCING).mean()),
        }
    )


def refused(figures: Iterable[Figure]) -> tuple[Gate, str] | None:
    """The first gate that a figure refuses, and those figures in words; None where none does."""
    bad = [figure for figure in figures if figure.verdict is Verdict.REFUSE]
    if not bad:
        return None
    gate = LIMITS[bad[0].name].gate
    return gate, "; ".join(str(figure) for figure in bad if LIMITS[figure.name].gate is gate)


def render_table() -> str:
    """`LIMITS` as Markdown."""
    rows = [
        f"| {name} | {limit.gate.value} | {limit.unit} | {said(limit.passes)} | {said(limit.works)} "
        f"| {limit.meaning} | {limit.origin} |"
        for name, limit in LIMITS.items()
    ]
    head = [
        "| Figure | In question | Unit | Passes | Warns within | Meaning | Origin |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


def _judged(values: Mapping[str, float]) -> tuple[Figure, ...]:
    return tuple(LIMITS[name].judge(name, value) for name, value in values.items())


def _likeness(prepared: Prepared) -> tuple[float, float]:
    """Correlation of the pair, and the contrast left in the subtraction as a share of that of pre-contrast.

    Of images smoothed by 1.5 mm, so that contrast is measured and not noise, over brain that does not enhance.
    """
    sigmas = [1.5 / s for s in prepared.pre.spacing_mm[::-1]]
    difference = ndimage.gaussian_filter(prepared.comparison.subtraction, sigmas)
    pre = ndimage.gaussian_filter(prepared.pre.voxels, sigmas)
    quiet = prepared.brain & (difference < np.quantile(difference[prepared.brain], 0.9))
    one, rest = pre[quiet], difference[quiet]
    left = max(robust_std(rest) ** 2 - prepared.comparison.sigma**2 * _noise_kept(sigmas), 0.0) ** 0.5
    return float(np.corrcoef(one, one + rest)[0, 1]), left / max(float(one.std()), 1e-6)


def _noise_kept(sigmas: list[float]) -> float:
    """Share of the variance of white noise that a Gaussian (sigmas in voxels) lets through."""
    point = np.zeros(257)
    point[128] = 1.0
    return float(np.prod([(ndimage.gaussian_filter1d(point, sigma) ** 2).sum() for sigma in sigmas]))


def _covered(prepared: Prepared) -> float:
    """Share of the brain whose place lies inside the low-dose image."""
    ones = sitk.Cast(prepared.native_low.to_sitk() * 0 + 1, sitk.sitkUInt8)
    inside = sitk.Resample(ones, prepared.pre.to_sitk(), prepared.pre_to_low, sitk.sitkNearestNeighbor, 0)
    return float(sitk.GetArrayFromImage(inside)[prepared.brain].mean())


def _darkening(prepared: Prepared) -> float:
    """Whether contrast came with the low-dose image: vessels and always-enhancing tissue brighten, never darken."""
    smooth = ndimage.gaussian_filter(prepared.comparison.subtraction, [1.0 / s for s in prepared.pre.spacing_mm[::-1]])
    inside = smooth[prepared.brain]
    limit = 5 * robust_std(inside)
    return float((inside < -limit).mean() - (inside > limit).mean())
