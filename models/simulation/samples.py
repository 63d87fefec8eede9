"""Simulated studies as the network sees them: phantom, then exactly the preprocessing of inference.

Hides where training examples come from and how they are varied. Registration and brain finding are skipped (the
phantom is aligned up to its residual error and knows its brain); gain, subtraction and noise go through
`models.preprocess.compare`.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.condition import NAMES, Conditions, vector
from models.preprocess import compare
from models.quality import Figure, judge_comparison, refused
from models.simulation.phantom import Phantom, make_phantom
from models.simulation.scenario import Scenario
from models.statistics import SCALE_QUANTILE
from models.volume import Array, Mask

Half = npt.NDArray[np.float16]
QUIET, QUIET_MM = 0.01, 2.5  # of white matter; distance to anything above it
SPACING = NAMES.index("log_spacing_i")
TRAIN_SEED, TEST_SEED, VALIDATION_SEED = 1_000_000, 600_000_000, 900_000_000  # first seeds of ranges that never meet


@dataclass(frozen=True)
class Block:
    """What training needs: images (3, k, j, i) as the network takes them, truth and regions (k, j, i), condition."""

    images: Half  # subtraction, pre, sigma map
    truth: Half  # contrast enhancement of the standard dose, white matter = 1
    brain: npt.NDArray[np.bool_]
    quiet: npt.NDArray[np.bool_]  # brain farther than QUIET_MM from any enhancement of the truth
    condition: Array

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Along i, j, k."""
        i, j, k = np.exp(self.condition[SPACING : SPACING + 3].astype(float))
        return float(i), float(j), float(k)


@dataclass(frozen=True)
class Sample(Block):
    """A block of a simulated study, with the lesions that were drawn and how."""

    labels: npt.NDArray[np.int16]
    diameters_mm: tuple[float, ...]
    scenario: Scenario
    conditions: Conditions  # of which `condition` is the vector
    figures: tuple[Figure, ...]  # of the quality gate, as far as a part of a head has them


def make_sample(seed: int, **options: object) -> Sample | None:
    """Simulate a block (see `make_phantom` for `options`).

    None where it holds too little brain to measure a gain, or where the quality gate would refuse such a pair.
    """
    return usable(make_phantom(seed, **options))  # type: ignore[arg-type]


def usable(phantom: Phantom) -> Sample | None:
    """What preprocessing makes of a phantom, unless too little of it is brain or the quality gate refuses it."""
    if phantom.brain.mean() < 0.03:
        return None
    sample = sample_of(phantom)
    return None if refused(sample.figures) else sample


def sample_of(phantom: Phantom) -> Sample:
    """What preprocessing makes of a phantom."""
    brain, scenario = phantom.brain, phantom.scenario
    pre = scaled(phantom.pre, brain)
    seen = compare(pre, scaled(phantom.low, brain), brain, scenario.spacing_mm)
    conditions = scenario.conditions(seen.sigma, seen.noise_left)
    truth = np.maximum(phantom.enhancement / level_of(phantom.pre, brain), 0)
    return Sample(
        np.stack([seen.subtraction, pre, seen.sigma_map]).astype(np.float16),
        truth.astype(np.float16),
        brain,
        quiet_brain(truth, brain, scenario.spacing_mm),
        vector(conditions),
        phantom.lesion_labels.astype(np.int16),
        phantom.lesion_diameters_mm,
        scenario,
        conditions,
        judge_comparison(seen, brain),
    )


def level_of(image: Array, brain: Mask) -> float:
    """About white matter."""
    return float(np.quantile(image[brain], SCALE_QUANTILE))


def scaled(image: Array, brain: Mask) -> Array:
    """The image in units of white matter."""
    return image / level_of(image, brain)


def quiet_brain(truth: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> Mask:
    """Brain where no signal belongs; blur closer to true enhancement is an error, not a false enhancement."""
    mask: Mask = brain & (ndimage.distance_transform_edt(truth < QUIET, sampling=spacing_mm[::-1]) > QUIET_MM)
    return mask


def stream(
    first_seed: int, workers: int, make: Callable[[int], Block | None] = make_sample
) -> Generator[Block, None, None]:
    """Blocks of ascending seeds, simulated in other processes; the order does not depend on their speed."""
    seeds = itertools.count(first_seed)
    pool = ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn"))
    try:
        pending = deque(pool.submit(make, next(seeds)) for _ in range(4 * workers))
        while True:
            sample = pending.popleft().result()
            pending.append(pool.submit(make, next(seeds)))
            if sample is not None:
                yield sample
    finally:
        pool.shutdown(cancel_futures=True)
