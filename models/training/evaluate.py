"""Evaluation on studies that no training run saw: the network, the linear engine and the raw linear amplification.

Hides the metrics of contrast enhancement. Errors are measured where contrast matters (the true enhancement) and where
it must not appear (brain that does not enhance), never over the whole head, where deleting a tumour improves the
score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from models.runtime import linear
from models.training.phantom import draw_scenario
from models.training.samples import Sample, make_sample
from models.volume import Array, Mask

TEST_SEED = 500_000_000  # of phantoms; training and validation draw from other ranges
ENHANCING, QUIET, FALSE = 0.1, 0.01, 0.1  # of white matter
MARGIN_MM = 2.5  # around true enhancement: blur there is counted as error, not as false enhancement

Method = Callable[[Sample], Array]


@dataclass(frozen=True)
class Score:
    """Metrics of one method on one study. Signals in units of white matter."""

    ce_error: float  # mean |y - truth| where the truth enhances
    slope: float  # of y on truth there
    intercept: float
    false_per_ml: float  # voxels with y > 0.1 per mL of brain farther than 2.5 mm from any true enhancement


def score(signal: Array, truth: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> Score | None:
    """Compare a predicted with the true enhancement, arrays (k, j, i); None where nothing enhances."""
    enhancing = brain & (truth > ENHANCING)
    quiet = brain & (ndimage.distance_transform_edt(truth < QUIET, sampling=spacing_mm[::-1]) > MARGIN_MM)
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    if enhancing.sum() < 30 or not quiet.any():
        return None
    slope, intercept = np.polyfit(truth[enhancing], signal[enhancing], 1)
    return Score(
        float(np.abs(signal - truth)[enhancing].mean()),
        float(slope),
        float(intercept),
        float((signal[quiet] > FALSE).sum() / (quiet.sum() * voxel_ml)),
    )


def held_out(count: int, dose_fraction: float, side: int = 96) -> list[Sample]:
    """Simulated studies of fixed seeds at one dose fraction, everything else drawn as in training."""
    samples: list[Sample] = []
    seed = TEST_SEED
    while len(samples) < count:
        scenario = replace(draw_scenario(np.random.default_rng(seed)), dose_fraction=dose_fraction)
        sample = make_sample(seed, scenario=scenario, shape=(side, side, side))
        if sample is not None:
            samples.append(sample)
        seed += 1
    return samples


def linear_method(sample: Sample) -> Array:
    """The linear engine."""
    subtraction = sample.images[0].astype(np.float32)
    return linear(subtraction, sample.brain, sample.scenario.spacing_mm, sample.scenario.dose_fraction)


def raw_method(sample: Sample) -> Array:
    """Subtraction over dose, nothing else."""
    return np.maximum(sample.images[0].astype(np.float32) / sample.scenario.dose_fraction, 0)


def score_all(samples: Sequence[Sample], method: Method) -> list[Score | None]:
    """Scores of one method, study by study; None where nothing enhances."""
    return [score(method(s), s.truth.astype(np.float32), s.brain, s.scenario.spacing_mm) for s in samples]


def summary(scores: Sequence[Score | None]) -> dict[str, tuple[float, float, float]]:
    """Metric to its mean over studies and the 95 % bootstrap interval of that mean."""
    known = [one for one in scores if one is not None]
    return {metric: interval([getattr(one, metric) for one in known]) for metric in Score.__dataclass_fields__}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and 2.5 and 97.5 percentiles of the means of seeded resamples."""
    data = np.asarray(values)
    low, high = np.quantile(data[_resamples(len(data))].mean(axis=1), [0.025, 0.975])
    return float(data.mean()), float(low), float(high)


def error_ratio(scores: Sequence[Score | None], reference: Sequence[Score | None]) -> tuple[float, float, float]:
    """Ratio of the mean CE errors of two methods on the same studies, and its 95 % bootstrap interval."""
    pairs = zip(scores, reference, strict=True)
    errors = np.array([(a.ce_error, b.ce_error) for a, b in pairs if a is not None and b is not None])
    means = errors[_resamples(len(errors))].mean(axis=1)
    low, high = np.quantile(means[:, 0] / means[:, 1], [0.025, 0.975])
    return float(errors[:, 0].mean() / errors[:, 1].mean()), float(low), float(high)


def _resamples(count: int, rounds: int = 2000) -> np.ndarray:
    """Seeded bootstrap: indices (rounds, count), studies drawn with replacement."""
    return np.random.default_rng(0).integers(count, size=(rounds, count))
