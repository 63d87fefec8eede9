"""A digital phantom: one simulated study with its truth, everything from one seed.

Hides the order in which a study is made: what is drawn once (`scenario`), the head (`anatomy`), its images (`scanner`).
Must never change what a seed gives: the test studies are known by their seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.simulation.anatomy import draw_anatomy
from models.simulation.scanner import scan
from models.simulation.scenario import Scenario, draw_scenario
from models.volume import Array, Mask


@dataclass(frozen=True)
class Phantom:
    """One simulated study on one grid, arrays (k, j, i), white matter of the noise-free pre-contrast image = 1."""

    scenario: Scenario
    pre: Array
    low: Array  # other gain, a residual misalignment, its own noise
    enhancement: Array  # truth: noise-free CE of the standard dose
    brain: Mask
    lesion_labels: np.ndarray  # int16, 0 = none
    lesion_diameters_mm: tuple[float, ...]
    standard: Array | None = None  # the standard dose acquired as `low` is, if asked for


def make_phantom(
    seed: int,
    *,
    shape: tuple[int, int, int] = (96, 96, 96),
    scenario: Scenario | None = None,
    whole: bool = False,
    standard: bool = False,
) -> Phantom:
    """Simulate one study.

    Args:
        seed: everything random follows from it.
        shape: (k, j, i) of the grid.
        scenario: what is fixed; drawn from the seed where None.
        whole: centre the head upright in the grid, with its face, at the nominal flip angle, neither ringing nor
            interpolated; otherwise a randomly turned and placed part of it.
        standard: acquire the standard dose, too; nothing else changes.
    """
    rng = np.random.default_rng(seed)
    scenario = scenario or draw_scenario(rng)
    anatomy = draw_anatomy(shape, scenario, rng, whole=whole)
    images = scan(anatomy, scenario, rng, whole=whole, standard=standard)
    return Phantom(
        scenario,
        images.pre,
        images.low,
        images.enhancement,
        anatomy.brain,
        anatomy.labels,
        tuple(anatomy.diameters),
        images.standard,
    )
