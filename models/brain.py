"""Where the brain is in a T1 volume, and whether what was found is one.

Hides the figures by which a brain is told from what is none. The extractor (`models.extractor`) was trained on heads
alone and outlines a bottle of gel or a fruit as surely as a brain; so what it says is compared with itself (its two
networks, the image and its mirror image), and what lies inside the outline with what lies inside every brain: grey
matter around white, in one compact piece of a child's to a large adult's volume. Deterministic. Must never say "found"
where a figure is outside `BRAIN_LIMITS`: it says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from models.extractor import COARSE_SIDE, Extraction, Extractor, largest_part, resized
from models.statistics import robust_std
from models.volume import Array, Mask, Volume

Numbers = npt.NDArray[np.float64]

_BLOCK_MM = 3.0  # figures are measured on means of about this size: less noise, and slices of any thickness alike
_SHADING_MM = 25.0  # Gaussian of what the coil, not the tissue, does to the intensity
_SURFACE_MM = 12.0  # deeper than this, depth says nothing more about the tissue
_CLOSING_MM = 10.0
_DEEP_MM = 8.0


class NoBrainError(ValueError):
    """The volume does not hold a brain that can be told from other things: the detail says which check failed."""


@dataclass(frozen=True)
class BrainLimit:
    """The range of a figure within which a brain is believed, and what it means."""

    least: float
    most: float
    meaning: str


BRAIN_LIMITS: dict[str, BrainLimit] = {
    "volume": BrainLimit(400.0, 2600.0, "mL inside the outline"),
    "agreement": BrainLimit(0.93, inf, "Dice of the coarse and the fine network"),
    "mirrored": BrainLimit(0.95, inf, "Dice of the coarse network with itself in the mirror image"),
    "unsure": BrainLimit(0.0, 0.025, "voxels of a probability between .1 and .9, as a share of the brain's"),
    "solidity": BrainLimit(0.975, inf, "share of the outline in itself with its dents of 20 mm filled"),
    "layers": BrainLimit(0.30, inf, "rank correlation of brightness with depth, which grey around white matter makes"),
    "texture": BrainLimit(0.07, inf, "spread of brightness deep inside, without shading"),
    "inside": BrainLimit(0.60, inf, "share of the surface of the outline that is not cut by the border of the image"),
}


@dataclass(frozen=True)
class Brain:
    """The brain (k, j, i) on the grid of the volume, and the figures of `BRAIN_LIMITS` by name."""

    mask: Mask
    figures: Mapping[str, float]


def find_brain(head: Volume) -> Brain:
    """The brain in a T1 volume, without the wider fluid around it.

    Args:
        head: T1-weighted volume, any intensity unit, any orientation; whole, defaced or skull-stripped.

    Raises:
        NoBrainError: nothing was found that passes every check.
        ModelError: the extractor's files are not those of its card.
    """
    seen = _extractor().extract(head)
    if seen is None:
        raise NoBrainError("nothing in the image looks like a brain")
    mask = outline(seen)
    figures = measure(seen, mask)
    for name, check in BRAIN_LIMITS.items():
        if not check.least <= figures[name] <= check.most:
            raise NoBrainError(f"{name} is {figures[name]:.3g}: {check.meaning} ({_range(check)} in a brain)")
    found: Mask = np.ascontiguousarray(seen.axes.back(mask))
    return Brain(found, figures)


def extractor_digest() -> str:
    """What tells two extractors apart: another one gives another outline, and so other results.

    Raises:
        ModelError: the extractor's files are not those of its card.
    """
    return _extractor().digest


@lru_cache(maxsize=1)
def _extractor() -> Extractor:
    return Extractor()


def _range(check: BrainLimit) -> str:
    return f"{check.least:g} or more" if check.most == inf else f"{check.least:g} to {check.most:g}"


def outline(seen: Extraction) -> Mask:
    """The largest part that is likelier brain than not, without holes; (x, y, z) of the extraction."""
    whole: Mask = ndimage.binary_fill_holes(largest_part(seen.probability > 0.5))
    return whole


def measure(seen: Extraction, mask: Mask) -> dict[str, float]:
    """The figures of `BRAIN_LIMITS` of an outline (x, y, z); one too small to measure has a volume and zeros."""
    volume_ml = float(mask.sum() * np.prod(seen.spacing_mm) / 1000)
    coarse = largest_part(seen.coarse > 0.5)
    figures = {
        "volume": volume_ml,
        "agreement": dice(coarse, resized(mask, (COARSE_SIDE,) * 3) > 0),
        "mirrored": dice(coarse, largest_part(seen.mirrored > 0.5)),
        "unsure": float(((seen.fine > 0.1) & (seen.fine < 0.9)).sum() / max(int((seen.fine > 0.5).sum()), 1)),
    }
    sides = [max(1, round(_BLOCK_MM / s)) for s in seen.spacing_mm]
    spacing = np.array(seen.spacing_mm) * sides
    inside = block_means(mask.astype(np.float32), sides) > 0.5
    depth = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    if not (depth > _DEEP_MM).any():
        return {**dict.fromkeys(BRAIN_LIMITS, 0.0), **figures}
    relative = _without_shading(block_means(seen.image, sides) - np.float32(seen.floor), inside, spacing)
    return {
        **figures,
        "solidity": _solidity(inside, spacing),
        "layers": _layers(relative[inside], depth[inside]),
        "texture": robust_std(relative[depth > _DEEP_MM]),
        "inside": _uncut(inside, spacing),
    }


def dice(one: Mask, other: Mask) -> float:
    """2 |A and B| / (|A| + |B|); 0 where both are empty."""
    return float(2 * (one & other).sum() / max(int(one.sum()) + int(other.sum()), 1))


def block_means(array: Array, sides: list[int]) -> Array:
    """Means of blocks of `sides` voxels; what is left over at the far ends is left out."""
    x, y, z = (n // side for n, side in zip(array.shape, sides, strict=True))
    whole = array[: x * sides[0], : y * sides[1], : z * sides[2]]
    means: Array = whole.reshape(x, sides[0], y, sides[1], z, sides[2]).mean(axis=(1, 3, 5))
    return means


def _without_shading(image: Array, inside: Mask, spacing: Numbers) -> Array:
    """Brightness over its local mean in the outline."""
    wide = list(_SHADING_MM / spacing)
    share = ndimage.gaussian_filter(inside.astype(np.float32), wide)
    level = ndimage.gaussian_filter(np.where(inside, image, 0).astype(np.float32), wide)
    relative: Array = image * share / np.where(np.abs(level) > 1e-9, level, 1e-9)
    return relative


def _layers(brightness: Array, depth: Array) -> float:
    ranks = np.argsort(np.argsort(brightness, kind="stable"), kind="stable")
    return float(np.corrcoef(np.minimum(depth, _SURFACE_MM), ranks)[0, 1])


def _solidity(inside: Mask, spacing: Numbers) -> float:
    room = [int(np.ceil(_CLOSING_MM / s)) + 2 for s in spacing]
    padded = np.pad(inside, [(n, n) for n in room])
    grown = ndimage.distance_transform_edt(~padded, sampling=spacing) <= _CLOSING_MM
    closed = padded | (ndimage.distance_transform_edt(grown, sampling=spacing) > _CLOSING_MM)
    return float(padded.sum() / closed.sum())


def _uncut(inside: Mask, spacing: Numbers) -> float:
    """Share of the faces of the outline's voxels, by area, beyond which the image goes on."""
    total = cut = 0.0
    for axis in range(3):
        area = float(np.prod(spacing) / spacing[axis])
        first, last = inside.take(0, axis).sum(), inside.take(-1, axis).sum()
        cut += area * float(first + last)
        total += area * float(np.abs(np.diff(np.pad(inside, 1).astype(np.int8), axis=axis)).sum())
    return 1 - cut / total
