"""The ICBM 152 template from which heads are simulated (its notice is models/atlas/NOTICE).

Hides how the maps are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files

import numpy as np

from models.volume import Mask, Volume

_BITS = {"t1": 6, "gm": 5, "wm": 5}


@dataclass(frozen=True)
class Atlas:
    """ICBM 152 2009a on its 1 mm grid: T1 average and tissue fractions, each (k, j, i) in 0..1."""

    t1: Volume
    grey: Volume
    white: Volume

    @property
    def intracranial(self) -> Mask:
        """Where the template has signal: brain and the CSF around it."""
        inside: Mask = self.t1.voxels > 0.02
        return inside


@lru_cache(maxsize=1)
def load_atlas() -> Atlas:
    """Read the bundled template."""
    with as_file(files("models") / "atlas" / "icbm152.npz") as path, np.load(path) as data:
        affine = data["affine"]
        maps = {n: Volume(data[n].astype(np.float32) / (2**bits - 1), affine) for n, bits in _BITS.items()}
    return Atlas(maps["t1"], maps["gm"], maps["wm"])
