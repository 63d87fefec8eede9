"""The published brain extractor deepbet, run by ONNX Runtime: from a volume to a probability of brain in each voxel.

Hides the two networks and what they were trained to see: one for the place of the brain in the whole image, on 128^3
voxels, and one for its outline in a box around that place, on 256^3, both in axes right, anterior, superior. Sizes,
quantiles and the margin of the box are facts of deepbet 1.0.2 (Fisch et al., Comput. Biol. Med. 179, 108845, 2024; MIT,
the notice lies beside the networks). Its weights are not ours and were converted by `models.training.extractor`. Must
never load a network whose digest its card does not state, and never judge what it found: that is `models.brain`'s.
"""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from models.card import ZOO, ModelError, sha256_of
from models.volume import Array, Mask, Volume

FOLDER = ZOO / "deepbet-1.0.2"
COARSE_SIDE, FINE_SIDE = 128, 256
_QUANTILES = (0.005, 0.995)  # of the coarse image: the range that is kept
_MEAN, _SPREAD = 0.449, 0.226  # of what the networks see
_LEAST_SHARE = 0.02  # of a plane of the coarse image, that brain must fill for the plane to lie in the box
_MARGIN = 0.1  # of the brain's extent, on either side

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Extraction:
    """What the two networks say; arrays (x, y, z) along right, anterior, superior, or the voxel axes nearest."""

    image: Array  # the volume, in its own units
    spacing_mm: tuple[float, float, float]
    floor: float  # intensity that counts as none: an image may be offset
    coarse: Array  # probability on COARSE_SIDE^3 over the whole image
    mirrored: Array  # the same of the image whose right and left are exchanged, exchanged back
    box: Box  # of the image, in which the second network looked
    fine: Array  # probability on FINE_SIDE^3 over the box
    axes: _Axes

    @property
    def probability(self) -> Array:
        """On the grid of `image`; 0 outside the box."""
        whole = np.zeros(self.image.shape, np.float32)
        inside = whole[self.box]
        inside[...] = resized(self.fine, inside.shape)
        return whole


class _Axes(NamedTuple):
    """How voxel axes lie to right, anterior, superior."""

    order: tuple[int, int, int]  # which of i, j, k runs most nearly along each
    backwards: tuple[bool, bool, bool]

    def forth(self, voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """(k, j, i) to (x, y, z), a view."""
        turned = voxels.transpose(2, 1, 0).transpose(self.order)
        return turned[tuple(slice(None, None, -1 if back else 1) for back in self.backwards)]

    def back(self, turned: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The inverse of `forth`."""
        voxels = turned[tuple(slice(None, None, -1 if back else 1) for back in self.backwards)]
        i, j, k = np.argsort(self.order)
        return voxels.transpose(k, j, i)


def axes_of(volume: Volume) -> _Axes:
    """The voxel axis nearest to each of right, anterior and superior; each is used once."""
    directions = volume.affine[:3, :3] / np.array(volume.spacing_mm)  # rows L, P, S; columns i, j, k
    _, order = linear_sum_assignment(-np.abs(directions))
    towards = directions[range(3), order] * (-1, -1, 1)  # of right, anterior, superior
    return _Axes(tuple(int(n) for n in order), tuple(bool(t < 0) for t in towards))  # type: ignore[arg-type]


class Extractor:
    """The networks of a folder, checked. A session lives only while it is used: two never stand side by side."""

    def __init__(self, folder: Path = FOLDER, *, threads: int = 0) -> None:
        """Read and check the card.

        Args:
            folder: holds card.toml, coarse.onnx and fine.onnx.
            threads: of the CPU; 0 is all cores. They do not change the result.

        Raises:
            ModelError: a file is missing, or its digest is not the one that the card states.
        """
        self._threads = threads
        self._networks = {name: folder / f"{name}.onnx" for name in ("coarse", "fine")}
        try:
            stated = tomllib.loads((folder / "card.toml").read_text(encoding="utf-8"))["sha256"]
            found = {path.name: (sha256_of(path), stated[path.name]) for path in self._networks.values()}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"model folder {folder.name!r} is incomplete: {type(error).__name__}") from error
        for name, (digest, said) in found.items():
            if digest != said:
                raise ModelError(f"{folder.name}: {name} has SHA-256 {digest[:12]}, the card says {said[:12]}")
        digests = " ".join(digest for digest, _ in found.values())
        self.digest = hashlib.sha256(digests.encode()).hexdigest()  # of both networks: what decides an outline

    def extract(self, head: Volume) -> Extraction | None:
        """Probability of brain; None where the first network sees none.

        Args:
            head: T1-weighted volume, any intensity unit, any orientation.
        """
        axes = axes_of(head)
        image: Array = np.nan_to_num(axes.forth(head.voxels))
        small = resized(image, (COARSE_SIDE,) * 3)
        low, high = (float(value) for value in np.quantile(small, _QUANTILES))
        if not high > low:
            return None
        seen = _as_seen(small, low, high)
        coarse, mirrored = self._run("coarse", seen, np.ascontiguousarray(seen[::-1]))
        box = _box(coarse, image.shape)
        if box is None:
            return None
        (fine,) = self._run("fine", _as_seen(resized(image[box], (FINE_SIDE,) * 3), low, high))
        x, y, z = (head.spacing_mm[axis] for axis in axes.order)
        return Extraction(image, (x, y, z), low, coarse, mirrored[::-1], box, fine, axes)

    def _run(self, name: str, *images: Array) -> list[Array]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # what is free is given back
        session = ort.InferenceSession(str(self._networks[name]), options, providers=["CPUExecutionProvider"])
        return [session.run(["probability"], {"image": image[None, None]})[0][0, 0] for image in images]


def resized(array: npt.NDArray[np.generic], shape: tuple[int, ...]) -> Array:
    """The voxel that lies under the centre of each new one (torch's `nearest-exact`)."""
    under = (
        np.minimum(((np.arange(there) + 0.5) * (here / there)).astype(int), here - 1)
        for here, there in zip(array.shape, shape, strict=True)
    )
    taken: Array = array[np.ix_(*under)]  # type: ignore[assignment]
    return taken


def largest_part(mask: Mask) -> Mask:
    """The largest set of voxels that hang together by their faces."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    part: Mask = labels == 1 + int(np.bincount(labels.ravel())[1:].argmax())
    return part


def _as_seen(image: Array, low: float, high: float) -> Array:
    clipped = np.clip((image - np.float32(low)) / np.float32(high - low), 0, 1)
    seen: Array = (_SPREAD * (clipped - clipped.mean()) / max(float(clipped.std()), 1e-6) + _MEAN).astype(np.float32)
    return seen


def _box(coarse: Array, shape: tuple[int, ...]) -> Box | None:
    """The extent of the largest part, and a margin, in voxels of the image; None where no plane holds enough of it."""
    part = largest_part(coarse > 0.5)
    slices = []
    for axis, size in enumerate(shape):
        planes = np.flatnonzero(part.mean(axis=tuple(a for a in range(3) if a != axis)) > _LEAST_SHARE)
        if planes.size == 0:
            return None
        first, end = int(planes[0]), int(planes[-1]) + 1
        factor = size / coarse.shape[axis]
        centre, extent = round(factor * (first + end) / 2), round(factor * (end - first) * (1 + 2 * _MARGIN))
        slices.append(slice(max(0, int(centre - extent / 2)), min(size, int(centre + extent / 2))))
    return slices[0], slices[1], slices[2]
