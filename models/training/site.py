"""Training blocks from a site's own studies: what a real standard-dose image says that the low dose should have shown.

Hides the target of the paper (arXiv 2403.03539): the subtraction of the standard dose, kept where it stands out of the
local noise, y = p max(z, 0). Differently from the reference code, the noise is that of an untruncated distribution
followed to where it is stronger than elsewhere, and a voxel is judged together with its neighbours. Must never mix
studies of training and validation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log

import numpy as np
from scipy import ndimage

from models.condition import Conditions, vector
from models.noise import local_statistics
from models.preprocess import Comparison, Prepared, compare
from models.quality import judge_comparison, refused
from models.simulation.phantom import make_phantom
from models.simulation.samples import Block, quiet_brain, scaled, usable
from models.statistics import robust_std
from models.volume import Array, Mask

SLOPE, EVEN_T = 2 * log(99) / 3, 2.5  # of the logit of p, and the t at which p = 0.5: p(1) = 0.01, p(4) = 0.99
OWN_WEIGHT = 0.5  # of a voxel in its joint t; its 26 neighbours share the rest
FEWEST = 50  # enhancing voxels of a usable standard dose: vessels alone are more
LEAST_BRAIN = 0.03  # of a block worth validating


class TripletError(ValueError):
    """The standard-dose image is no truth for the low-dose image."""


@dataclass(frozen=True)
class SiteData:
    """A site's studies, one block for each: those to train on, and those of one patient, held out."""

    training: tuple[Block, ...]
    validation: tuple[Block, ...]

    @property
    def summary(self) -> str:
        """What a model card says of the data."""
        count = len(self.training)
        return f"site: {count} {'study' if count == 1 else 'studies'}"


def hold_out(patients: Mapping[str, Sequence[Block]]) -> SiteData:
    """Keep all studies of one patient for validation: the one whose identity has the lowest SHA-256.

    So another seed or a further study of a known patient changes nothing. A patient added with a lower digest is held
    out from then on; where the one held out is taken away, the next has been learned from by earlier stages.

    Args:
        patients: identity, in whatever form stays the same, to the blocks of that patient.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(patients) < 2:
        raise ValueError(
            f"usable studies of at least two patients are needed, one for validation; there are {len(patients)}"
        )
    held, *others = sorted(patients, key=lambda patient: hashlib.sha256(patient.encode()).digest())
    return SiteData(tuple(block for patient in others for block in patients[patient]), tuple(patients[held]))


def make_block(low: Prepared, standard: Prepared, conditions: Conditions) -> Block:
    """The whole working grid of a study as one training block.

    Args:
        low: pre-contrast and low dose.
        standard: the same pre-contrast and standard dose.
        conditions: of the low dose.

    Raises:
        TripletError: the two pairs lie on different grids, or the standard dose shows no more than the low dose.
    """
    brain, spacing_mm = low.brain, low.pre.spacing_mm
    if brain.shape != standard.brain.shape or not np.allclose(low.pre.affine, standard.pre.affine):
        raise TripletError("the two pairs lie on different grids")
    _refuse_less_contrast(low.comparison, standard.comparison, brain, spacing_mm)
    truth = target(standard.comparison.subtraction, brain, spacing_mm)
    seen = low.comparison
    return Block(
        np.stack([seen.subtraction, low.pre.voxels, seen.sigma_map]).astype(np.float16),
        truth.astype(np.float16),
        brain,
        quiet_brain(truth, brain, spacing_mm),
        vector(conditions),
    )


def simulated_block(seed: int, *, masked: bool) -> Block | None:
    """A simulated block that knows no more of the truth than a site: the standard dose as it was acquired.

    Args:
        seed: as in `make_sample`; the network sees the same.
        masked: the target of the paper; otherwise its subtraction as it is, where positive. What counts as quiet brain
            follows from the mask either way: without it noise would leave none.

    Returns:
        None where the quality gate would refuse either pair; the further checks of a site's triplets are not made.
    """
    phantom = make_phantom(seed, standard=True)
    low = usable(phantom)
    if low is None or phantom.standard is None:
        return None
    brain, spacing_mm = phantom.brain, low.spacing_mm
    seen = compare(scaled(phantom.pre, brain), scaled(phantom.standard, brain), brain, spacing_mm)
    if refused(judge_comparison(seen, brain)):
        return None
    kept = target(seen.subtraction, brain, spacing_mm)
    truth = kept if masked else np.maximum(seen.subtraction, 0)
    return Block(low.images, truth.astype(np.float16), brain, quiet_brain(kept, brain, spacing_mm), low.condition)


def _refuse_less_contrast(
    low: Comparison, standard: Comparison, brain: Mask, spacing_mm: tuple[float, float, float]
) -> None:
    enhancing = brain & (enhancement_chance(standard.subtraction, brain, spacing_mm) > 0.5)
    if enhancing.sum() < FEWEST:
        raise TripletError(f"only {enhancing.sum()} voxels of the standard dose enhance")
    ratio = float(low.subtraction[enhancing].mean() / standard.subtraction[enhancing].mean())
    if ratio > 1:
        raise TripletError(f"the low dose enhances {ratio:.2f} times as much as the standard dose")


def target(subtraction: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> Array:
    """The target y = p max(z, 0) of a standard-dose subtraction z, (k, j, i) float32 in units of white matter."""
    y: Array = enhancement_chance(subtraction, brain, spacing_mm) * np.maximum(subtraction, 0)
    return y


def enhancement_chance(subtraction: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> Array:
    """The chance p = sigmoid(w t + b) that a voxel enhances; p(1) = 0.01, p(2.5) = 0.5, p(4) = 0.99.

    t = (z - mean) / std of the subtraction z, with local mean and noise, is judged jointly over 3^3 voxels.

    Its weights sum to one: a region that enhances evenly by t keeps p(t) exactly, whatever its noise,
    and only what noise does to single voxels shrinks (to about half).
    """
    mean, std = _plain_tissue(subtraction, brain, spacing_mm)
    t = (subtraction - mean) / np.maximum(std, 1e-6)
    others = (27 * ndimage.uniform_filter(t, 3) - t) / 26
    joint = OWN_WEIGHT * t + (1 - OWN_WEIGHT) * others
    chance: Array = 1 / (1 + np.exp(np.clip(SLOPE * (EVEN_T - joint), -50, 50)))
    return chance.astype(np.float32)


def _plain_tissue(subtraction: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> tuple[Array, Array]:
    """Local mean and noise of what does not enhance.

    Six rounds from one limit for all: with that alone, noise of twice the average would be cut off at one standard
    deviation and read as 0.6 of what it is. Each round halves what is missing.
    """
    sigma: Array | float = robust_std(subtraction[brain]) + 1e-6
    for _ in range(6):
        mean, sigma = local_statistics(subtraction, brain, spacing_mm, sigma)
    return mean, np.asarray(sigma)


def padded(block: Block, size: int) -> Block:
    """The block with its edges repeated where a side is shorter than `size`."""
    missing = [max(0, size - n) for n in block.brain.shape]
    if not any(missing):
        return block
    sides = [(n // 2, n - n // 2) for n in missing]
    grown = {name: np.pad(getattr(block, name), sides, mode="edge") for name in ("truth", "brain", "quiet")}
    return replace(block, images=np.pad(block.images, [(0, 0), *sides], mode="edge"), **grown)


def cut(block: Block, side: int, stride: int) -> Iterator[Block]:
    """Blocks of at most `side` voxels, their sides multiples of `stride`, that together cover the brain."""
    whole = padded(block, stride)
    corners, sizes = [], []
    for n in whole.brain.shape:
        size = min(side, n // stride * stride)
        sizes.append(size)
        corners.append(np.unique(np.linspace(0, n - size, -(-n // size)).astype(int)))
    for corner in product(*corners):
        box = tuple(slice(c, c + size) for c, size in zip(corner, sizes, strict=True))
        if whole.brain[box].mean() >= LEAST_BRAIN:
            regions = {name: getattr(whole, name)[box] for name in ("truth", "brain", "quiet")}
            yield replace(whole, images=whole.images[:, *box], **regions)
