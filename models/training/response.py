"""How enhancement grows with the dose, learned from voxels without images.

Hides what such a voxel is made of: an enhancing tissue over others, in an acquisition that is drawn as for a study, by
the same signal equations. A study takes seconds and shows the network one acquisition; here a second shows a thousand,
and what a header says of saturation needs tens of thousands (ADR 15). Must never see a study of evaluation: no voxel
here belongs to any study.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from models.condition import vector
from models.simulation.anatomy import BLOOD_MM, CHOROID_MM, DURA_MM, LESION_MM, PIA_MM
from models.simulation.physics import draw_tissue, signal
from models.simulation.scanner import B1_RANGE, RECEIVE_SPREAD, TRANSMIT_MEAN, TRANSMIT_SPREAD, depart
from models.simulation.scenario import draw_flow, draw_relaxivity, draw_scenario, draw_uptake
from models.statistics import SCALE_QUANTILE
from models.training.network import DoseResponse, dose_fraction
from models.training.patches import with_gaps
from models.volume import Array

VOXELS = 48  # of an acquisition
BATCH, LEARNING_RATE = 512, 3e-3  # acquisitions of a step; the highest learning rate. Chosen, like the next five
WARM_UP, WEIGHT_DECAY, LARGEST_GRADIENT = 100, 1e-4, 1.0  # steps over which the rate rises; of AdamW; norm of a step
FILLED_SHARE = 0.3  # of voxels that the enhancing tissue fills; in the others it has any share from .05 on
TEXTURE, UPTAKE_SPREAD = 0.025, 0.4  # relative deviations between voxels of one tissue, as in the simulator's heads
PASSES = 50  # steps: as many as show every acquisition so many times
FAINT = 0.02  # of white matter: what enhances less tells nothing
_CHUNK = 500
_MEASURED = 0.03, (0.45, 0.3, 0.2)  # noise, which a response is not told
# What enhances, with how often it is drawn, and what may share its voxel, with how much of it.
_ENHANCING = {"lesion": 0.35, "blood": 0.3, "pia": 0.15, "dura": 0.1, "mucosa": 0.1}
_BESIDE = {"white": 0.4, "grey": 0.4, "csf": 0.4, "oedema": 0.08, "necrosis": 0.05}
_BRAIN = {"white": 0.5, "grey": 0.5, "csf": 0.15}  # of which images are scaled
# "mucosa" is that of the choroid plexus: the head's lies outside the brain.
_UPTAKE_MM = {"blood": BLOOD_MM, "pia": PIA_MM, "dura": DURA_MM, "mucosa": CHOROID_MM}


def draw_voxels(seed: int, index: int) -> tuple[Array, Array]:
    """The voxels of one acquisition.

    Returns:
        (3, VOXELS): subtraction, pre-contrast image and enhancement of the standard dose, white matter = 1, without
        noise; and the condition (len(NAMES),).
    """
    rng = np.random.default_rng([seed, index])
    scenario = draw_scenario(rng)
    sequence, field = scenario.sequence, scenario.field_strength_t
    r1, uptake = draw_relaxivity(scenario, rng), draw_uptake(scenario, rng)
    tissues = {name: draw_tissue(name, field, rng) for name in {**_ENHANCING, **_BESIDE}}
    tissues["blood"] = replace(tissues["blood"], pd=tissues["blood"].pd * draw_flow(sequence, rng))
    mean, spread, receive = (rng.uniform(*limits) for limits in (TRANSMIT_MEAN, TRANSMIT_SPREAD, RECEIVE_SPREAD))

    def fields(count: int) -> tuple[np.ndarray, np.ndarray]:
        b1 = np.clip(mean * (1 + spread * rng.standard_normal(count)), *B1_RANGE)
        return b1, np.exp(receive * rng.standard_normal(count))

    def plain(shares: np.ndarray, names: Iterable[str], b1: np.ndarray) -> np.ndarray:
        none = np.zeros(len(b1))
        signals = [signal(tissues[name], sequence, none, r1, b1) for name in names]
        return np.asarray(np.sum(shares.T * np.stack(signals), axis=0))

    b1, bias = fields(2 * VOXELS)
    brain = plain(rng.dirichlet([*_BRAIN.values()], 2 * VOXELS), _BRAIN, b1)
    level = np.quantile(np.abs(brain) * bias, SCALE_QUANTILE)

    b1, bias = fields(VOXELS)
    which = rng.choice(len(_ENHANCING), VOXELS, p=[*_ENHANCING.values()])
    filled = np.where(rng.uniform(size=VOXELS) < FILLED_SHARE, 1.0, rng.uniform(0.05, 1, VOXELS))
    beside = rng.dirichlet([*_BESIDE.values()], VOXELS)
    rest = (1 - filled) * plain(beside, _BESIDE, b1)
    texture = 1 + TEXTURE * rng.standard_normal(VOXELS)
    concentration = _concentration(which, rng) * uptake
    ideal = {}
    for dose in (0.0, scenario.dose_fraction, 1.0):
        enhancing = np.empty(VOXELS)
        for place, name in enumerate(_ENHANCING):
            at = which == place
            enhancing[at] = signal(tissues[name], sequence, concentration[at] * dose, r1, b1[at])
        ideal[dose] = (rest + filled * texture * enhancing) * bias / level
    low = depart(ideal[0.0], ideal[scenario.dose_fraction], ideal[1.0], scenario.dose_fraction, rng)
    pre, low, full = np.abs(ideal[0.0]), np.abs(low), np.abs(ideal[1.0])
    conditions = scenario.conditions(*_MEASURED)
    return np.stack([low - pre, pre, np.maximum(full - pre, 0)]).astype(np.float32), vector(conditions)


def _concentration(which: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Concentrations at the standard dose (VOXELS,) in mM: one of blood, others vary within their tissue."""
    weakest, strongest = np.log(LESION_MM)
    level = np.exp(rng.uniform(weakest, strongest, VOXELS))
    for place, name in enumerate(_ENHANCING):
        if name in _UPTAKE_MM:
            level[which == place] = rng.uniform(*_UPTAKE_MM[name])
    varied = level * np.clip(1 + UPTAKE_SPREAD * rng.standard_normal(VOXELS), 0.1, 2.5)
    return np.where(which == [*_ENHANCING].index("blood"), level, varied)


def learned(
    seed: int, acquisitions: int, *, told: bool = True, workers: int = 1, device: torch.device | None = None
) -> tuple[DoseResponse, float]:
    """A response learned from voxels of so many acquisitions, some of their headers with gaps.

    Args:
        seed: everything random follows from it.
        acquisitions: to draw: a thousand a second and core.
        told: whether headers tell anything; if not, it is the response of a network without conditions.
        workers: processes that draw.
        device: to learn on, and of the response.

    Returns:
        The response, and its mean error in the last steps over that of proportion, where the standard dose enhances.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        response = DoseResponse().to(device)
    drawn, conditions = _drawn(seed, acquisitions, workers)
    voxels = torch.from_numpy(drawn).to(device)
    rng = np.random.default_rng([seed, acquisitions])  # the voxels have those before
    optimizer = torch.optim.AdamW(response.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = max(1, PASSES * acquisitions // BATCH)
    ratios = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP, 2 * (1 - step / steps))
        which = rng.integers(acquisitions, size=BATCH)
        header = torch.from_numpy(with_gaps(conditions[which], rng)).to(device) * float(told)
        subtraction, pre, truth = voxels[which][..., None, None].split(1, dim=1)
        proportional = subtraction / dose_fraction(header)[:, None, None, None, None]
        weight = (truth > FAINT) * torch.rsqrt(1 + truth)
        error = (weight * (response(proportional, pre, header) - truth).abs()).sum()
        optimizer.zero_grad(set_to_none=True)
        (error / weight.sum()).backward()
        nn.utils.clip_grad_norm_(response.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        ratios.append((error / (weight * (proportional - truth).abs()).sum()).detach())
    return response, float(torch.stack(ratios[-100:]).mean())


def _drawn(seed: int, acquisitions: int, workers: int) -> tuple[Array, Array]:
    """Voxels (acquisitions, 3, VOXELS) and conditions (acquisitions, len(NAMES))."""
    starts = range(0, acquisitions, _CHUNK)
    parts = [range(start, min(start + _CHUNK, acquisitions)) for start in starts]
    if workers > 1 and len(parts) > 1:
        with ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn")) as pool:
            drawn = [*itertools.chain.from_iterable(pool.map(_chunk, itertools.repeat(seed), parts))]
    else:
        drawn = [*itertools.chain.from_iterable(_chunk(seed, part) for part in parts)]
    voxels, conditions = zip(*drawn, strict=True)
    return np.stack(voxels), np.stack(conditions)


def _chunk(seed: int, part: range) -> list[tuple[Array, Array]]:
    return [draw_voxels(seed, index) for index in part]
