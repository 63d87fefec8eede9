"""Small simulated heads for tests of the models: quick to make, the same in every run."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from models.agents import BY_NAME
from models.condition import Conditions
from models.preprocess import Prepared, prepare
from models.simulation.phantom import Phantom, make_phantom
from models.simulation.physics import Sequence
from models.simulation.scenario import Scenario
from models.volume import Array, Volume

MPRAGE = Sequence("MPRAGE", 1.9, 0.0025, 9.0, 0.9, 0.008, 176)


@lru_cache(maxsize=4)
def head(*, stripped: bool, seed: int = 3) -> Phantom:
    """A whole head at 2 mm with a few lesions, one third of the dose, 3 T."""
    scenario = Scenario(
        field_strength_t=3.0,
        agent=BY_NAME["gadobutrol"],
        dose_fraction=1 / 3,
        sequence=MPRAGE,
        spacing_mm=(2.0, 2.0, 2.0),
        sigma=0.02,
        stripped=stripped,
        lesions=6,
    )
    return make_phantom(seed, shape=(96, 120, 100), scenario=scenario, whole=True)


def as_volume(voxels: Array, spacing_mm: float = 2.0) -> Volume:
    """On an axial grid centred on the origin."""
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = [-(n - 1) * spacing_mm / 2 for n in voxels.shape[::-1]]
    return Volume(voxels.astype(np.float32), affine)


@lru_cache(maxsize=2)
def prepared_head(*, stripped: bool) -> Prepared:
    """The pair of `head`, prepared once for all tests that only look at it."""
    phantom = head(stripped=stripped)
    return prepare(as_volume(phantom.pre), as_volume(phantom.low))


def conditions(dose: float | None = 1 / 30, agent: str | None = "gadobutrol") -> Conditions:
    """A usual acquisition: 3 T, MPRAGE, a third of the standard dose."""
    return Conditions(3.0, agent, dose, "MPRAGE", 0.03, (0.35, 0.25, 0.15), (1.0, 1.0, 1.0))
