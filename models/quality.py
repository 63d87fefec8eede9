"""The quality gate: are these two volumes the same head and sequence, and is the signal believable?

Hides the thresholds, which stand in one table with their origin. Must never stop a study without a figure and a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy import ndimage

from models.condition import TRAINED, Conditions
from models.preprocess import Prepared
from models.volume import Array


class Verdict(Enum):
    """What a figure says, from good to bad."""

    PASS = "pass"  # noqa: S105  the good verdict, not a password
    WARN = "warn"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Figure:
    """One measured figure and what it says."""

    name: str
    value: float
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class _Limit:
    warn: float
    refuse: float
    text: str  # with the origin of the numbers

    def judge(self, name: str, value: float) -> Figure:
        sign = 1 if self.refuse >= self.warn else -1  # whether larger is worse
        bad, doubtful = sign * value > sign * self.refuse, sign * value > sign * self.warn
        verdict = Verdict.REFUSE if bad or not np.isfinite(value) else Verdict.WARN if doubtful else Verdict.PASS
        return Figure(name, round(float(value), 5), verdict, self.text)


LIMITS: dict[str, _Limit] = {
    "pair_correlation": _Limit(
        0.88, 0.80, "correlation of pre-contrast and low dose in brain that does not enhance; "
        "like sequences measured .87 to .95, unlike ones .57 to .69"
    ),
    "gain_field_sd": _Limit(0.04, 0.12, "standard deviation of the gain field; unlike pairs measured .07 to .09"),
    "noise": _Limit(0.10, 0.30, "noise of the subtraction, white matter = 1; the network was trained up to about .11"),
    "brain_ml": _Limit(700.0, 500.0, "volume of the brain found in the pre-contrast image, mL"),
    "darkening": _Limit(
        0.001, 0.005, "share of the brain that clearly darkens less the share that brightens; "
        "above 0 there is no contrast or the series have changed places"
    ),
    "enhancing_fraction": _Limit(0.20, 0.50, "share of the brain predicted to enhance by more than 0.1"),
}  # fmt: skip


def judge_pair(prepared: Prepared) -> list[Figure]:
    """Figures of the pair before inference."""
    comparison, brain, pre = prepared.comparison, prepared.brain, prepared.pre
    ml = float(brain.sum()) * abs(float(np.linalg.det(pre.affine[:3, :3]))) / 1000
    figures = {
        "pair_correlation": _correlation(prepared),
        "gain_field_sd": float(comparison.gain_field[brain].std()),
        "noise": comparison.sigma,
        "brain_ml": ml,
    }
    return [LIMITS[name].judge(name, value) for name, value in figures.items()]


def judge_signal(signal: Array, prepared: Prepared) -> list[Figure]:
    """Figures of the predicted signal (working grid, white matter = 1)."""
    share = float((signal[prepared.brain] > 0.1).mean())
    return [LIMITS["enhancing_fraction"].judge("enhancing_fraction", share)]


def judge_conditions(conditions: Conditions) -> list[Figure]:
    """Whether the acquisition lies inside what the network was trained on; a factor of two outside is refused."""
    values = {
        "field_strength_t": conditions.field_strength_t,
        "dose_fraction": conditions.dose_fraction,
        "spacing_mm": max(conditions.spacing_mm),
        "sigma": conditions.sigma,
    }
    out = []
    for name, (low, high) in TRAINED.items():
        value = values[name]
        if value is not None:
            near = (0.0 if name == "sigma" else low / 2) <= value <= high * 2  # little noise harms nobody
            verdict = Verdict.PASS if low <= value <= high else Verdict.WARN if near else Verdict.REFUSE
            out.append(Figure(name, round(value, 5), verdict, f"training covered {low:g} to {high:g}"))
    return out


def judge_order(prepared: Prepared) -> list[Figure]:
    """Whether contrast came with the low-dose image: vessels and always-enhancing tissue brighten, never darken."""
    smooth = ndimage.gaussian_filter(prepared.comparison.subtraction, [1.0 / s for s in prepared.pre.spacing_mm[::-1]])
    inside = smooth[prepared.brain]
    limit = 5 * 1.4826 * float(np.median(np.abs(inside - np.median(inside))))
    excess = float((inside < -limit).mean() - (inside > limit).mean())
    return [LIMITS["darkening"].judge("darkening", excess)]


def _correlation(prepared: Prepared) -> float:
    """Of images smoothed by 1.5 mm, so that it measures contrast and not noise, where the pair does not enhance."""
    sigmas = [1.5 / s for s in prepared.pre.spacing_mm[::-1]]
    difference = ndimage.gaussian_filter(prepared.comparison.subtraction, sigmas)
    pre = ndimage.gaussian_filter(prepared.pre.voxels, sigmas)
    inside = difference[prepared.brain]
    limit = np.quantile(inside, 0.9)
    quiet = prepared.brain & (difference < limit)
    return float(np.corrcoef(pre[quiet], (pre + difference)[quiet])[0, 1])
