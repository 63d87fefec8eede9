"""What one step of training sees: patches of blocks, randomly placed, turned and flipped, with gaps in the header.

Hides how blocks lie on the device, so that a step waits for no copy. Everything random follows from the generator that
is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.condition import NAMES, SEQUENCE_NAMES, TIMING_NAMES
from models.simulation.samples import SPACING, Block
from models.statistics import ENHANCING
from models.volume import Array, Mask

_DROP = 0.12  # chance that a header value is unknown in training. Chosen, like the next three
_ENHANCING_SHARE, _FROM = 0.5, ENHANCING / 2  # of patches, and the truth at which they are placed: weak ones, too
_OFF_CENTRE = 8  # voxels, along each axis, that a patch lies off the place that was drawn
_PLACES = 4096  # of a block that are kept to draw from
_EFFECTIVE = ("log_effective_dose", "relaxivity", "agent_known")
_REPETITION = ("log_repetition_time", "repetition_time_known")
_INVERSION = ("log_inversion_time", "inversion_time_known")
_FLIP = ("log_flip_angle", "flip_angle_known")
_DROPPED = (  # what becomes unknown together: the effective dose needs field strength, agent and dose
    ("field", "field_known", *_EFFECTIVE),
    ("log_dose_fraction", "dose_known", *_EFFECTIVE),
    _EFFECTIVE,
    (*SEQUENCE_NAMES, *TIMING_NAMES),  # timing means nothing without its class
    TIMING_NAMES,
    _REPETITION,
    _INVERSION,
    _FLIP,
)
GAPS = tuple([NAMES.index(name) for name in group] for group in _DROPPED)  # columns of the condition


class Held:
    """A block as training holds it: one half-precision tensor on the device, and the places where patches may lie."""

    def __init__(self, block: Block, device: torch.device) -> None:
        layers = [*block.images, block.truth, block.brain.astype(np.float16), block.quiet.astype(np.float16)]
        self.layers = torch.from_numpy(np.stack(layers)).to(device)  # (6, k, j, i): images, truth, brain, quiet brain
        self.condition = block.condition
        self._brain = _places(block.brain)
        self._enhancing = _places(block.truth > _FROM)

    def patch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Array]:
        """A randomly placed, turned and flipped patch.

        Returns:
            (6, size, size, size): images, truth, brain and quiet brain; and the condition, its spacing turned likewise.
        """
        sides = self.layers.shape[1:]
        start = [int(np.clip(c - size // 2, 0, n - size)) for c, n in zip(self._centre(rng), sides, strict=True)]
        order = rng.permutation(3)
        box = tuple(slice(s, s + size) for s in start)
        turned = self.layers[:, *box].permute(0, *(int(axis) + 1 for axis in order))
        turned = turned.flip([axis + 1 for axis in range(3) if rng.uniform() < 0.5])
        condition = self.condition.copy()
        spacing_kji = condition[SPACING : SPACING + 3][::-1]
        condition[SPACING : SPACING + 3] = spacing_kji[order][::-1]
        return turned, condition

    def _centre(self, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """A share of the patches at enhancement, the rest anywhere in the brain."""
        where = self._enhancing if rng.uniform() < _ENHANCING_SHARE and len(self._enhancing) else self._brain
        place = np.unravel_index(where[rng.integers(len(where))], tuple(self.layers.shape[1:]))
        return np.array(place) + rng.integers(-_OFF_CENTRE, _OFF_CENTRE + 1, 3)


def _places(mask: Mask) -> npt.NDArray[np.intp]:
    """Some thousand places in a mask, evenly spread: a list of all of them is larger than the block."""
    where = np.flatnonzero(mask)
    return where[:: max(1, len(where) // _PLACES)]


def draw_batch(held: Sequence[Held], count: int, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Patches (count, 6, size, size, size) of random blocks, and conditions with gaps; float32 on their device."""
    drawn = [held[int(rng.integers(len(held)))].patch(size, rng) for _ in range(count)]
    layers = torch.stack([patch for patch, _ in drawn]).float()
    conditions = with_gaps(np.stack([condition for _, condition in drawn]), rng)
    return layers, torch.from_numpy(conditions).to(layers.device)


def with_gaps(conditions: Array, rng: np.random.Generator) -> Array:
    """Copies of conditions (n, len(NAMES)) in which what a header may lack is unknown at random."""
    gone = np.zeros(conditions.shape, bool)
    for columns in GAPS:
        gone[:, columns] |= rng.uniform(size=(len(conditions), 1)) < _DROP
    return np.where(gone, np.float32(0), conditions)
