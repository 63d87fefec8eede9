"""Evaluation on studies that no training run saw: metrics of contrast enhancement, and the methods compared.

Hides the metrics. Errors are measured where contrast matters (the true enhancement) and where it must not appear
(brain that does not enhance), never over the whole head, where deleting a tumour improves the score. The same seed
gives the same anatomy and the same noise at every dose, so that doses, the true standard dose and a rescan without
contrast are compared on equal terms. Intervals resample whole studies: lesions of one study are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.noise import high_pass_noise
from models.quality import refused
from models.runtime import LINEAR_GATE, linear
from models.simulation.phantom import make_phantom
from models.simulation.samples import TEST_SEED, Sample, quiet_brain, sample_of
from models.simulation.scenario import draw_scenario
from models.statistics import ENHANCING, robust_std
from models.volume import Array, Mask

FALSE = ENHANCING  # signal that counts as false enhancement in quiet brain
FAINT = 0.02  # of white matter: a lesion whose mean truth is below is not counted, nor a voxel as enhancement
WHITE = 0.8  # quiet brain that is brighter before contrast is about white matter
JUDGED_DOSE = 0.33  # at which the quality gate takes or refuses a study
LEVELS = FALSE * 1.1 ** np.arange(-13, 48)  # thresholds at which false components are counted, .03 to 9
COMPONENT_MM = 2.0  # diameter of the ball whose volume a connected component must have to count
CHANCE = 5.5  # d' that a known-location observer needs to find a lesion anywhere in a brain

Method = Callable[[Sample], Array]
Interval = tuple[float, float, float]  # mean, 2.5 and 97.5 percentiles


@dataclass(frozen=True)
class Score:
    """Metrics of one method on one study. Signals in units of white matter; NaN where a study has no such voxel."""

    ce_error: float  # mean |y - truth| where the truth enhances
    slope: float  # of y on truth there
    intercept: float
    false_per_ml: float  # voxels with y > 0.1 per mL of brain farther than 2.5 mm from any true enhancement
    false_components: float  # connected groups of those voxels of 2 mm and more, per litre of brain
    quiet_signal: float  # mean y in that brain
    halo_per_ml: float  # voxels with y > 0.1 per mL of the brain nearer to it where the truth is below 0.02
    psnr_db: float  # where the truth enhances; peak = 1 (white matter), never the maximum
    ssim: float  # there; range 1
    dice: float  # of y > 0.1 and truth > 0.1 in the brain


@dataclass(frozen=True)
class LesionRange:
    """Lesions by diameter (mm) and mean true enhancement, from the lower limits to below the upper ones."""

    smallest_mm: float = 0.0
    largest_mm: float = np.inf
    weakest: float = 0.0
    strongest: float = np.inf

    def holds(self, diameter_mm: float, enhancement: float) -> bool:
        """Whether a lesion is one of them."""
        return self.smallest_mm <= diameter_mm < self.largest_mm and self.weakest <= enhancement < self.strongest


LARGE = LesionRange(5)


@dataclass(frozen=True)
class Lesion:
    """One lesion of one study under one method."""

    study: int
    diameter_mm: float
    enhancement: float  # mean truth
    recovery: float  # mean y / mean truth
    peak_recovery: float  # of the 0.95 quantiles
    error: float  # mean |y - truth|
    before: float  # mean of the pre-contrast image
    added: float  # mean y
    noise: float  # of the image shown, pre + y, in its quiet brain (high-pass, robust)
    cnr: float  # (lesion - background) / noise in pre + y; background: quiet brain about as bright as white matter
    lbr: float  # lesion / background
    level: float  # the highest threshold at which it is found: 0.9 quantile of y in it


@dataclass(frozen=True)
class Found:
    """What one method does with a set of studies."""

    scores: list[Score | None]  # study by study; None where nothing enhances
    lesions: list[Lesion]
    false_counts: npt.NDArray[np.intp]  # false components above each of LEVELS, all studies
    studies: int

    def among(self, limits: LesionRange) -> list[Lesion]:
        """The lesions of a range."""
        return [one for one in self.lesions if limits.holds(one.diameter_mm, one.enhancement)]


def score(signal: Array, truth: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> Score | None:
    """Compare a predicted with the true enhancement, arrays (k, j, i); None where nothing enhances."""
    from skimage.metrics import structural_similarity  # noqa: PLC0415  evaluation alone needs it

    enhancing = brain & (truth > ENHANCING)
    quiet = quiet_brain(truth, brain, spacing_mm)
    if enhancing.sum() < 30 or not quiet.any():
        return None
    slope, intercept = np.polyfit(truth[enhancing], signal[enhancing], 1)
    error = (signal - truth)[enhancing]
    _, similarity = structural_similarity(truth, signal, data_range=1.0, full=True)
    quiet_ml = float(quiet.sum() * np.prod(spacing_mm)) / 1000
    halo = brain & ~quiet & (truth < FAINT)
    found = brain & (signal > FALSE)
    with np.errstate(divide="ignore"):  # infinite for the truth itself
        psnr = float(-10 * np.log10(np.mean(error**2)))
    return Score(
        float(np.abs(error).mean()),
        float(slope),
        float(intercept),
        float((signal[quiet] > FALSE).sum() / quiet_ml),
        _components(signal, quiet, spacing_mm, FALSE) / quiet_ml * 1000,
        float(signal[quiet].mean()),
        float((signal[halo] > FALSE).sum() / max(float(halo.sum() * np.prod(spacing_mm)) / 1000, 1e-9)),
        psnr,
        float(similarity[enhancing].mean()),
        float(2 * (found & enhancing).sum() / (found.sum() + enhancing.sum())),
    )


def _components(signal: Array, quiet: Mask, spacing_mm: tuple[float, float, float], threshold: float) -> int:
    """Connected groups above a threshold in quiet brain that are as large as a 2 mm ball."""
    above = quiet & (signal > threshold)
    if not above.any():
        return 0
    labels, _ = ndimage.label(above, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())[1:] * float(np.prod(spacing_mm))
    return int((sizes >= np.pi / 6 * COMPONENT_MM**3).sum())


def lesions_of(sample: Sample, signal: Array, study: int) -> Iterator[Lesion]:
    """What a method shows of every lesion of at least 3 voxels whose mean truth is 0.02 or more."""
    truth, pre = sample.truth.astype(np.float32), sample.images[1].astype(np.float32)
    noise = high_pass_noise(pre + signal, sample.quiet if sample.quiet.any() else sample.brain)
    white = sample.quiet & (pre > WHITE)
    background = float((pre + signal)[white if white.any() else sample.brain].mean())
    for label, diameter in enumerate(sample.diameters_mm, 1):
        where = sample.labels == label
        if where.sum() < 3 or truth[where].mean() < FAINT:
            continue
        before, added, true = float(pre[where].mean()), signal[where], truth[where]
        yield Lesion(
            study,
            diameter,
            float(true.mean()),
            float(added.mean() / true.mean()),
            float(np.quantile(added, 0.95) / np.quantile(true, 0.95)),
            float(np.abs(added - true).mean()),
            before,
            float(added.mean()),
            noise,
            (before + float(added.mean()) - background) / noise,
            (before + float(added.mean())) / max(background, 1e-6),
            float(np.quantile(added, 0.9)),
        )


def make_test_sample(seed: int, dose_fraction: float, side: int, stated: float | None = None) -> Sample | None:
    """A study of a fixed seed at a dose; `stated` is what its header says, where that differs (rescans: dose 0)."""
    scenario = replace(draw_scenario(np.random.default_rng(seed)), dose_fraction=dose_fraction)
    phantom = make_phantom(seed, scenario=scenario, shape=(side, side, side))
    if phantom.brain.mean() < 0.03:
        return None
    return sample_of(replace(phantom, scenario=replace(scenario, dose_fraction=stated or dose_fraction)))


def usable_studies(
    count: int, side: int = 96, *, first: int = TEST_SEED, workers: int = 1
) -> tuple[dict[int, Sample], int]:
    """The first `count` studies, by seed, that the quality gate takes at JUDGED_DOSE, and how many it refused.

    No image is made of a study that is refused. The same seeds serve every dose.
    """
    seeds = range(first, first + count + count // 2 + 4)
    usable: dict[int, Sample] = {}
    turned_away = 0
    for seed, sample in zip(seeds, _simulated(seeds, JUDGED_DOSE, side, None, workers), strict=True):
        if len(usable) == count:
            break
        if sample is None:
            continue
        if refused(sample.figures):
            turned_away += 1
        else:
            usable[seed] = sample
    return usable, turned_away


def held_out(
    seeds: Sequence[int], dose_fraction: float, side: int = 96, *, stated: float | None = None, workers: int = 1
) -> list[Sample]:
    """Simulated studies at one dose fraction, everything else drawn as in training."""
    made = _simulated(seeds, dose_fraction, side, stated, workers)
    return [sample for sample in made if sample is not None]


def _simulated(
    seeds: Sequence[int], dose_fraction: float, side: int, stated: float | None, workers: int
) -> Iterator[Sample | None]:
    arguments = [seeds, *([value] * len(seeds) for value in (dose_fraction, side, stated))]
    if workers == 1:
        yield from map(make_test_sample, *arguments)
    else:
        with ProcessPoolExecutor(workers) as pool:
            yield from pool.map(make_test_sample, *arguments)


def linear_method(sample: Sample) -> Array:
    """The linear engine: 0.8 mm Gaussian, noise gate, 1/dose."""
    subtraction = sample.images[0].astype(np.float32)
    return linear(subtraction, sample.brain, sample.scenario.spacing_mm, sample.scenario.dose_fraction)


def raw_method(sample: Sample) -> Array:
    """Subtraction over dose, nothing else."""
    return sample.images[0].astype(np.float32) / np.float32(sample.scenario.dose_fraction)


def copy_method(sample: Sample) -> Array:
    """The low dose shown as it is."""
    return sample.images[0].astype(np.float32)


def non_local_means_method(sample: Sample) -> Array:
    """Non-local means over the subtraction, the linear engine's gate, 1/dose."""
    from skimage.restoration import denoise_nl_means  # noqa: PLC0415  evaluation alone needs it

    subtraction = sample.images[0].astype(np.float32)
    sigma = float(np.median(sample.images[2].astype(np.float32)[sample.brain]))
    smooth = denoise_nl_means(subtraction, 3, 3, h=0.7 * sigma, sigma=sigma, fast_mode=True).astype(np.float32)
    spread = max(robust_std(smooth[sample.brain]), 1e-6)
    return np.where(smooth > LINEAR_GATE * spread, smooth / sample.scenario.dose_fraction, 0).astype(np.float32)


def apply(samples: Sequence[Sample], method: Method) -> Found:
    """Run one method over studies and measure it."""
    scores: list[Score | None] = []
    lesions: list[Lesion] = []
    false = np.zeros(len(LEVELS), np.intp)
    for study, sample in enumerate(samples):
        signal, truth = method(sample), sample.truth.astype(np.float32)
        scores.append(score(signal, truth, sample.brain, sample.scenario.spacing_mm))
        lesions += lesions_of(sample, signal, study)
        false += [_components(signal, sample.quiet, sample.scenario.spacing_mm, level) for level in LEVELS]
    return Found(scores, lesions, false, len(samples))


def summary(scores: Sequence[Score | None]) -> dict[str, Interval]:
    """Metric to its mean over studies and the 95 % bootstrap interval of that mean."""
    known = [one for one in scores if one is not None]
    return {metric: interval([getattr(one, metric) for one in known]) for metric in Score.__dataclass_fields__}


def interval(values: Sequence[float]) -> Interval:
    """Mean, and 2.5 and 97.5 percentiles of the means of seeded resamples."""
    data = np.asarray(values)
    low, high = np.quantile(data[_resamples(len(data))].mean(axis=1), [0.025, 0.975])
    return float(data.mean()), float(low), float(high)


def error_ratio(scores: Sequence[Score | None], reference: Sequence[Score | None]) -> Interval:
    """Ratio of the mean CE errors of two methods on the same studies, and its 95 % bootstrap interval."""
    pairs = zip(scores, reference, strict=True)
    errors = np.array([(a.ce_error, b.ce_error) for a, b in pairs if a is not None and b is not None])
    means = errors[_resamples(len(errors))].mean(axis=1)
    low, high = np.quantile(means[:, 0] / means[:, 1], [0.025, 0.975])
    return float(errors[:, 0].mean() / errors[:, 1].mean()), float(low), float(high)


def by_study(lesions: Sequence[Lesion], value: Callable[[Lesion], float]) -> Interval:
    """Mean over lesions; the interval resamples studies with all their lesions."""
    return _ratio([one.study for one in lesions], [value(one) for one in lesions], [1.0] * len(lesions))


def percent_enhancement(lesions: Sequence[Lesion]) -> Interval:
    """CEP, 100 (post - pre) / pre, of means over all lesions: in a dark one alone the ratio has no limit."""
    tops, bottoms = [100 * one.added for one in lesions], [one.before for one in lesions]
    return _ratio([one.study for one in lesions], tops, bottoms)


def lesion_error_ratio(found: Found, reference: Found, limits: LesionRange) -> Interval:
    """Ratio of two methods' mean errors inside the same lesions."""
    tops, bottoms = found.among(limits), reference.among(limits)
    return _ratio([one.study for one in tops], [one.error for one in tops], [one.error for one in bottoms])


def sensitivity_difference(found: Found, threshold: float, other: Found, other_threshold: float) -> Interval:
    """How much larger a share of LARGE lesions one method finds than another in the same studies."""
    tops, bottoms = found.among(LARGE), other.among(LARGE)
    more = [
        float(one.level > threshold) - float(two.level > other_threshold)
        for one, two in zip(tops, bottoms, strict=True)
    ]
    return _ratio([one.study for one in tops], more, [1.0] * len(more))


def _ratio(studies: Sequence[int], tops: Sequence[float], bottoms: Sequence[float]) -> Interval:
    """Ratio of two sums over lesions, and its 95 % interval: studies are drawn with all their lesions."""
    if not studies:
        return float("nan"), float("nan"), float("nan")
    _, place = np.unique(studies, return_inverse=True)
    sums = np.stack([np.bincount(place, tops), np.bincount(place, bottoms)], axis=1)
    drawn = sums[_resamples(len(sums))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high)


def sensitivity(found: Found, threshold: float, limits: LesionRange) -> Interval:
    """Share of lesions of a range whose 0.9 quantile of signal exceeds the threshold."""
    return by_study(found.among(limits), lambda lesion: float(lesion.level > threshold))


def threshold_at(found: Found, false_per_study: float) -> float:
    """The lowest of LEVELS from which on there are at most so many false components per study.

    A lower threshold can have fewer where noise has grown together: that is no better.
    """
    too_many = np.flatnonzero(found.false_counts > false_per_study * found.studies)
    return float(LEVELS[min(too_many[-1] + 1, len(LEVELS) - 1) if len(too_many) else 0])


def ideal_sensitivity(samples: Sequence[Sample], limits: LesionRange) -> float:
    """Share of lesions of a range that a matched filter, told shape and place, would find (d' of 5.5 or more).

    An estimate, no bound: d'^2 is the energy of the true enhancement times the dose fraction over the variance of the
    subtraction. At low dose lesions enhance more than in proportion, and noise is not white.
    """
    told: list[bool] = []
    for sample in samples:
        truth = sample.truth.astype(np.float32)
        sigma = float(np.median(sample.images[2].astype(np.float32)[sample.brain]))
        for label, diameter in enumerate(sample.diameters_mm, 1):
            where = sample.labels == label
            mean = float(truth[where].mean()) if where.sum() >= 3 else 0.0
            if mean < FAINT or not limits.holds(diameter, mean):
                continue
            energy = float(np.sum((truth[where] * sample.scenario.dose_fraction) ** 2))
            told.append(np.sqrt(energy) / sigma >= CHANCE)
    return float(np.mean(told)) if told else float("nan")


def _resamples(count: int, rounds: int = 2000) -> np.ndarray:
    """Seeded bootstrap: indices (rounds, count), studies drawn with replacement."""
    return np.random.default_rng(0).integers(count, size=(rounds, count))
