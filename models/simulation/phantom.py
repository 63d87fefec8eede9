"""A digital phantom: randomised head anatomy with vessels, meninges and lesions, imaged before and after contrast.

Hides how anatomy is made from the ICBM 152 maps: random orientation, scale and warp, sharpened tissue fractions, and
drawn structures (sulci, vessels, dura, falx, mucosa, scalp; solid, ringed and irregular lesions; T1-bright blood and
cavities that do not enhance). The truth is the noise-free contrast enhancement of the standard dose. Everything follows
from one seed. Must never leave a structure that enhances only in one of low dose and truth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import fft, ndimage

from models.agents import AGENTS, Agent
from models.condition import Conditions
from models.simulation.atlas import load_atlas
from models.simulation.physics import (
    Sequence,
    Tissue,
    draw_sequence,
    draw_tissue,
    magnitude,
    signal,
    smooth_field,
)
from models.volume import Array, Mask

TWIST_DEG, SCALE, WARP_MM = 15.0, 0.15, 2.5
B1_RANGE, B1_NODES = (0.7, 1.3), 61  # transmit field, 1 = nominal (which is a node)
PSF_VOXELS = (0.3, 0.6)  # standard deviation of the point spread
INTERPOLATED, INTERPOLATED_VOXELS = 0.4, (0.6, 1.3)  # share of studies with an axis on a finer grid, its point spread
CURVE_NODES = 320  # of concentration
# Concentrations at the standard dose, mM. 0.1 mmol/kg in an extracellular volume of 0.2 to 0.25 L/kg are .4 to .5 in
# plasma, of which whole blood holds 1 - haematocrit, more in the first minutes, and a lesion its extravascular share.
BLOOD_MM, LESION_MM = (0.2, 0.5), (0.03, 0.5)
DURA_MM, PIA_MM, CHOROID_MM, MUCOSA_MM = (0.1, 0.4), (0.05, 0.4), (0.2, 0.5), (0.1, 0.4)
TRANSMIT_MEAN, TRANSMIT_SPREAD = (0.9, 1.05), (0.02, 0.1)  # of the flip angle's scale
RECEIVE_SPREAD = (0.0, 0.15)  # of the logarithm of the receive coil's gain
ATROPHY = 4.0  # fluid of a head over that of the maps, at most: intracranial share about 10 to 30 %
PIAL_SHARE = 0.7  # of vessels
SHORTEST_DELAY_S = 0.15  # between inversion and first readout that a header states in place of the inversion time
SMALL_MM = 6.0  # at least half of all lesions are below this
GRAIN_VOXELS, GRAIN = (1.0, 2.5), 0.6  # scale, and largest relative deviation, of uptake from one voxel to the next


@dataclass(frozen=True)
class Scenario:
    """What is drawn once per study."""

    field_strength_t: float
    agent: Agent
    dose_fraction: float  # of the agent's standard dose
    sequence: Sequence
    spacing_mm: tuple[float, float, float]  # i, j, k
    sigma: float  # noise of one image, white matter = 1
    stripped: bool
    lesions: int

    @property
    def dose_mmol_per_kg(self) -> float:
        """The injected dose."""
        return self.dose_fraction * self.agent.standard_dose_mmol_per_kg

    def conditions(self, sigma: float, noise_left: tuple[float, float, float]) -> Conditions:
        """What its header tells, and the noise that was measured."""
        return Conditions(
            field_strength_t=self.field_strength_t,
            agent=self.agent.name,
            dose_mmol_per_kg=self.dose_mmol_per_kg,
            sequence=self.sequence.kind,
            sigma=sigma,
            noise_left=noise_left,
            spacing_mm=self.spacing_mm,
            **self.sequence.stated,
        )

    @property
    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.sequence.kind} {self.field_strength_t:.3g} T, {self.dose_fraction:.0%} of the standard dose of "
            f"{self.agent.name}, noise {self.sigma:.3g}, {self.lesions} lesions"
        )


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


@dataclass
class _Anatomy:
    """Fractions per tissue (they sum to at most 1) and concentration at the standard dose per tissue (mM)."""

    fractions: dict[str, Array]
    concentration: dict[str, Array]
    brain: Mask
    labels: np.ndarray
    diameters: list[float]
    grain: Array  # of unit deviation: tissue is not uniform from one voxel to the next


def draw_scenario(rng: np.random.Generator) -> Scenario:
    """Field strength, agent, dose, sequence, grid and noise of a study, spread beyond clinical use."""
    field = float(rng.choice([1.5, 3.0, rng.uniform(1.4, 3.2)], p=[0.4, 0.45, 0.15]))
    agent = AGENTS[int(rng.integers(len(AGENTS)))]
    dose = float(
        rng.choice([rng.uniform(0.05, 0.2), rng.uniform(0.2, 0.5), rng.uniform(0.5, 1.0)], p=[0.3, 0.55, 0.15])
    )
    in_plane = float(rng.choice([1.0, rng.uniform(0.75, 1.2)]))
    through = in_plane if rng.uniform() < 0.6 else float(rng.uniform(0.8, 2.0))
    if rng.uniform() < 0.1:
        through = float(rng.uniform(2.0, 6.0))
    sigma = float(np.exp(rng.uniform(np.log(0.008), np.log(0.08))))
    lesions = 0 if rng.uniform() < 0.2 else int(rng.integers(1, 13))
    sequence, stripped = draw_sequence(rng), bool(rng.uniform() < 0.5)
    by_readout = bool(rng.uniform() < 0.6)  # how vendors state the timing of an inversion-prepared train differs
    by_delay = by_readout and bool(rng.uniform() < 0.7) and sequence.preparation_s >= SHORTEST_DELAY_S
    sequence = replace(sequence, states_readouts=by_readout, states_delay=by_delay)
    return Scenario(field, agent, dose, sequence, (in_plane, in_plane, through), sigma, stripped, lesions)


def draw_relaxivity(scenario: Scenario, rng: np.random.Generator) -> float:
    """That of the agent, 1/(mM s), which in tissue is not exactly that in plasma."""
    return float(scenario.agent.relaxivity_per_mm_s(scenario.field_strength_t) * rng.uniform(0.85, 1.15))


def draw_uptake(scenario: Scenario, rng: np.random.Generator) -> float:
    """Scale of all concentrations: a lower-dosed agent reaches the tissue in proportion to what is injected."""
    return float(scenario.agent.standard_dose_mmol_per_kg / 0.1 * rng.uniform(0.8, 1.2))


def draw_flow(sequence: Sequence, rng: np.random.Generator) -> float:
    """Scale of the signal of blood: fresh spins brighten it, dephasing and flow voids darken it."""
    return float(rng.uniform(0.25, 2.0) if sequence.kind != "SE" else rng.uniform(0.1, 1.0))


def with_choices(scenario: Scenario, **chosen: Any) -> Scenario:
    """The scenario with the given fields fixed; None leaves what was drawn. `noise` is the sigma of one image."""
    if "noise" in chosen:
        chosen["sigma"] = chosen.pop("noise")
    return replace(scenario, **{name: value for name, value in chosen.items() if value is not None})


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
    points = _atlas_points(shape, scenario.spacing_mm, rng, whole=whole)
    anatomy = _tissues(points, scenario, rng)
    _add_vessels(anatomy, scenario, rng)
    _add_lesions(anatomy, scenario, rng)
    return _image(anatomy, scenario, rng, whole=whole, standard=standard)


def _atlas_points(
    shape: tuple[int, int, int], spacing: tuple[float, ...], rng: np.random.Generator, *, whole: bool
) -> Array:
    """Atlas LPS mm of every voxel, (3, k, j, i): turned, scaled and smoothly warped."""
    axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * s for n, s in zip(shape, spacing[::-1], strict=True)]
    k, j, i = np.meshgrid(*axes, indexing="ij")
    centre = np.array([0.0, 17.0, 10.0])
    if whole:
        turn = _rotation(rng.uniform(-6, 6, 3))
    else:
        turn = _rotation(rng.uniform(-TWIST_DEG, TWIST_DEG, 3))[:, rng.permutation(3)] * rng.choice([-1, 1], 3)
        centre = centre + rng.uniform(-1, 1, 3) * np.array([45, 60, 45])
    turn = turn * rng.uniform(1 - SCALE, 1 + SCALE, 3)
    points = np.tensordot(turn, np.stack([i, j, k]), 1) + centre[:, None, None, None]
    mean_spacing = float(np.mean(spacing))
    for axis in range(3):
        points[axis] += smooth_field(shape, 24 / mean_spacing, WARP_MM, rng)
        points[axis] += smooth_field(shape, 7 / mean_spacing, 0.5, rng)
    return points.astype(np.float32)


def _rotation(degrees: np.ndarray) -> np.ndarray:
    out = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        a, b = [n for n in range(3) if n != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        out = out @ turn
    return out


def _sample(values: Array, points: Array) -> Array:
    """Linear interpolation of an atlas map at LPS points."""
    offset = load_atlas().t1.affine[:3, 3]
    at = [points[axis] - offset[axis] for axis in (2, 1, 0)]
    return ndimage.map_coordinates(values, at, order=1, mode="constant", cval=0.0)


def _tissues(points: Array, scenario: Scenario, rng: np.random.Generator) -> _Anatomy:
    """Fractions of brain tissue, meninges and, unless stripped, what lies outside the skull's inner table."""
    atlas = load_atlas()
    inside = _sample(atlas.intracranial.astype(np.float32), points)
    grey, white = _sample(atlas.grey.voxels, points), _sample(atlas.white.voxels, points)
    power = rng.uniform(1.3, 3.0)  # the maps are averages of many heads: one head is sharper
    rest = np.clip(inside - grey - white, 0, 1) * np.exp(rng.uniform(0, np.log(ATROPHY)))
    parts = np.stack([grey, white, rest]) ** power
    parts *= inside / np.maximum(parts.sum(axis=0), 1e-6)
    fractions = {"grey": parts[0], "white": parts[1], "csf": parts[2]}
    depth = ndimage.distance_transform_edt(inside > 0.5, sampling=scenario.spacing_mm[::-1]).astype(np.float32)
    _give_way(fractions, _sulci(fractions["white"], depth, scenario, rng))
    cut = _skull_strip(depth, scenario, rng) if scenario.stripped else 0.0
    _give_way(fractions, _subarachnoid(depth - cut, scenario, rng))
    brain = (depth > cut) & (depth > 0)
    grain = smooth_field(inside.shape, rng.uniform(*GRAIN_VOXELS), 1.0, rng)
    anatomy = _Anatomy(fractions, {}, brain, np.zeros(inside.shape, np.int16), [], grain)
    _add_meninges(anatomy, points, inside, scenario, rng)
    if not scenario.stripped:
        _add_head(anatomy, inside, scenario, rng)
    return anatomy


def _give_way(fractions: dict[str, Array], fluid: Array) -> None:
    """Cerebrospinal fluid in place of a share of brain tissue."""
    for name in ("grey", "white"):
        fractions["csf"] += fluid * fractions[name]
        fractions[name] *= 1 - fluid


def _sulci(white: Array, depth: Array, scenario: Scenario, rng: np.random.Generator) -> Array:
    """Share of fluid: sheets of up to 4 mm from the surface inwards, which an average of many heads has blurred."""
    mm = float(np.mean(scenario.spacing_mm))
    field = smooth_field(depth.shape, rng.uniform(6, 10) / mm, 1.0, rng)
    steepness = np.sqrt(sum(slope**2 for slope in np.gradient(field, *scenario.spacing_mm[::-1])))
    half = rng.uniform(0.2, 2.0) * np.clip(1 - depth / rng.uniform(8, 30), 0, 1)
    sheet = np.clip(0.5 + (half - np.abs(field) / np.maximum(steepness, 0.02)) / mm, 0, 1) * (half > 0)
    return (sheet * np.clip(1 - 1.5 * white, 0, 1)).astype(np.float32)


def _subarachnoid(depth: Array, scenario: Scenario, rng: np.random.Generator) -> Array:
    """Share of fluid between the dura and the cortex: none to about 7 mm, as heads of all ages have it."""
    mm = float(np.mean(scenario.spacing_mm))
    width = rng.uniform(0, 4) + smooth_field(depth.shape, 8 / mm, 1.5, rng)
    return np.clip((width - depth) / 1.5, 0, 1).astype(np.float32)


def _skull_strip(depth: Array, scenario: Scenario, rng: np.random.Generator) -> Array:
    """Depth (mm) at which skull stripping cuts: below the dura, and through the fluid around the cortex."""
    mm = float(np.mean(scenario.spacing_mm))
    return rng.uniform(1.2, 3.2) + smooth_field(depth.shape, 12 / mm, rng.uniform(0, 0.7), rng)


def _add_meninges(
    anatomy: _Anatomy, points: Array, inside: Array, scenario: Scenario, rng: np.random.Generator
) -> None:
    """Enhancing dura at the boundary and in the midline, pia in the sulci, choroid-like tissue in the ventricles."""
    shape = inside.shape
    soft = ndimage.gaussian_filter(inside, 0.8 / np.array(scenario.spacing_mm[::-1]))
    shell = np.clip(4 * soft * (1 - soft), 0, 1) ** 2
    patches = np.clip(0.5 + smooth_field(shape, 12, 0.5, rng), 0, 1)
    midline = np.exp(-((points[0] / rng.uniform(0.5, 1.0)) ** 2)) * (anatomy.fractions["csf"] > 0.3)
    dura = np.clip(shell * patches * rng.uniform(0.2, 0.9) + 0.7 * midline, 0, 0.9).astype(np.float32)
    _place(anatomy, "dura", dura, _uptake(anatomy, rng.uniform(*DURA_MM), rng))
    deep = ndimage.gaussian_filter(inside, 10 / np.array(scenario.spacing_mm[::-1])) > 0.97
    sulci = (anatomy.fractions["csf"] > 0.15) & (inside > 0.5) & ~deep
    pial = (smooth_field(shape, rng.uniform(1.5, 3.0), 1.0, rng) > rng.uniform(0.8, 2.0)) & sulci
    _place(anatomy, "pia", rng.uniform(0.3, 0.9) * _soften(pial), _uptake(anatomy, rng.uniform(*PIA_MM), rng, 0.5))
    choroid = (smooth_field(shape, 3, 1.0, rng) > 1.3) & deep & (anatomy.fractions["csf"] > 0.7)
    if choroid.any():
        _place(anatomy, "mucosa", _soften(choroid), _uptake(anatomy, rng.uniform(*CHOROID_MM), rng))


def _add_head(anatomy: _Anatomy, inside: Array, scenario: Scenario, rng: np.random.Generator) -> None:
    """Bone, fat, muscle and enhancing mucosa around the brain; air beyond."""
    distance = ndimage.distance_transform_edt(inside < 0.5, sampling=scenario.spacing_mm[::-1]).astype(np.float32)
    wobble = smooth_field(inside.shape, 15, 1.2, rng)
    bone_end, fat_end, skin_end = rng.uniform(4, 8), rng.uniform(9, 12), rng.uniform(13, 20)
    at = distance + wobble
    outside = np.clip(1 - inside, 0, 1)
    shells = {
        "bone": (distance > 0) & (at <= bone_end),
        "fat": (at > bone_end) & (at <= fat_end),
        "muscle": (at > fat_end) & (at <= skin_end),
    }
    for name, shell in shells.items():
        anatomy.fractions[name] = (shell * outside).astype(np.float32)
    spots = (smooth_field(inside.shape, 8, 1.0, rng) > 1.0) & shells["muscle"]
    _place(anatomy, "mucosa", _soften(spots), _uptake(anatomy, rng.uniform(*MUCOSA_MM), rng))
    anatomy.concentration["muscle"] = np.full(inside.shape, rng.uniform(0.02, 0.06), np.float32)


def _soften(mask: Mask) -> Array:
    return ndimage.gaussian_filter(mask.astype(np.float32), 0.6)


def _uptake(anatomy: _Anatomy, level_mm: float, rng: np.random.Generator, spread: float = 0.25) -> Array:
    """Concentration at the standard dose (mM): a level with smooth heterogeneity and grain."""
    smooth = np.clip(1 + smooth_field(anatomy.brain.shape, 5, spread, rng), 0.2, 2.0)
    return (level_mm * smooth * np.clip(1 + rng.uniform(0, GRAIN) * anatomy.grain, 0.1, 2.5)).astype(np.float32)


def _place(anatomy: _Anatomy, name: str, fraction: Array, concentration: Array | None) -> None:
    """Put a structure on top: everything below gives way by its fraction; concentrations mix by fraction."""
    fraction = np.clip(fraction, 0, 1)
    for below in anatomy.fractions.values():
        np.multiply(below, 1 - fraction, out=below)
    old = anatomy.fractions.get(name)
    if concentration is not None:
        before = anatomy.concentration.get(name)
        if old is None or before is None:
            anatomy.concentration[name] = concentration
        else:
            anatomy.concentration[name] = np.where(fraction > old, concentration, before)
    anatomy.fractions[name] = fraction if old is None else old + fraction


def _add_vessels(anatomy: _Anatomy, scenario: Scenario, rng: np.random.Generator) -> None:
    """Curved tubes of 0.25 to 3.5 mm radius, mostly thin, through brain and CSF, with one blood concentration."""
    shape = anatomy.brain.shape
    spacing = np.array(scenario.spacing_mm[::-1])
    starts = np.argwhere(ndimage.binary_dilation(anatomy.brain, iterations=1))
    if len(starts) == 0:
        return
    density = len(starts) * float(np.prod(spacing)) / 1e6  # litres of brain
    fluid = anatomy.fractions["csf"] > 0.3
    deep, pial = np.zeros(shape, np.float32), np.zeros(shape, np.float32)  # most vessels run in the sulci
    starts_pial = np.argwhere(anatomy.brain & fluid)
    for _ in range(int(rng.poisson(max(4.0, rng.uniform(60, 250) * density)))):
        in_fluid = len(starts_pial) > 0 and rng.uniform() < PIAL_SHARE
        tubes, places = (pial, starts_pial) if in_fluid else (deep, starts)
        large = rng.uniform() < 0.08
        radius = float(
            np.exp(rng.uniform(np.log(1.2), np.log(3.5)) if large else rng.uniform(np.log(0.25), np.log(1.2)))
        )
        _draw_tube(tubes, places[rng.integers(len(places))] * spacing, radius, spacing, rng)
    tubes = np.maximum(deep, pial * ndimage.binary_dilation(fluid))
    tubes *= sum(anatomy.fractions.values()) > 0.3  # none in air
    if scenario.stripped:
        tubes *= anatomy.brain
    _place(anatomy, "blood", tubes, np.full(shape, rng.uniform(*BLOOD_MM), np.float32))


def _draw_tube(
    tubes: Array, start_mm: np.ndarray, radius_mm: float, spacing: np.ndarray, rng: np.random.Generator
) -> None:
    position, direction = start_mm.astype(float), rng.standard_normal(3)
    step = float(min(spacing.min(), max(radius_mm, 0.4)))
    for _ in range(int(rng.uniform(15, 80) / step)):
        direction = direction + rng.standard_normal(3) * 0.25
        direction /= np.linalg.norm(direction)
        position = position + direction * step
        _stamp(tubes, position, radius_mm, spacing)


def _stamp(target: Array, centre_mm: np.ndarray, radius_mm: float, spacing: np.ndarray) -> None:
    """A ball with a linear edge of one voxel; thinner than a voxel it keeps its share of the voxel's volume."""
    edge = float(spacing.mean())
    reach = radius_mm + edge
    low = np.maximum(np.floor((centre_mm - reach) / spacing).astype(int), 0)
    high = np.minimum(np.ceil((centre_mm + reach) / spacing).astype(int) + 1, target.shape)
    if np.any(low >= high):
        return
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    axes = [(np.arange(a, b) * s - c) ** 2 for a, b, s, c in zip(low, high, spacing, centre_mm, strict=True)]
    distance = np.sqrt(axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :])
    full = min(1.0, (2 * radius_mm / edge) ** 2)
    np.maximum(target[box], full * np.clip(0.5 + (radius_mm - distance) / edge, 0, 1), out=target[box])


def _add_lesions(anatomy: _Anatomy, scenario: Scenario, rng: np.random.Generator) -> None:
    """Enhancing lesions of all sizes, then lookalikes that do not enhance."""
    deep = np.argwhere(ndimage.binary_erosion(anatomy.brain, iterations=2))
    if len(deep) == 0:
        return
    for _ in range(scenario.lesions):
        small = rng.uniform() < 0.6
        diameter = rng.uniform(1.5, SMALL_MM) if small else float(np.clip(np.exp(rng.normal(2.5, 0.6)), SMALL_MM, 45))
        _add_lesion(anatomy, deep[rng.integers(len(deep))], diameter, scenario, rng)
    for _ in range(int(rng.poisson(1.5))):
        name = str(rng.choice(["haemorrhage", "necrosis", "oedema"]))
        where = _blob(anatomy.brain.shape, deep[rng.integers(len(deep))], rng.uniform(2, 15), scenario, rng)
        _place(anatomy, name, where * anatomy.brain, None)


def _add_lesion(
    anatomy: _Anatomy, centre: np.ndarray, diameter: float, scenario: Scenario, rng: np.random.Generator
) -> None:
    shape = anatomy.brain.shape
    level = float(np.exp(rng.uniform(*np.log(LESION_MM))))
    depth = _depth(shape, centre, diameter / 2, scenario, rng)
    edge = float(np.mean(scenario.spacing_mm))
    body = np.clip(0.5 + depth / edge, 0, 1) * anatomy.brain
    if diameter > 8 and rng.uniform() < 0.7:
        halo = np.clip((depth + rng.uniform(3, 12)) / 4, 0, 1) * anatomy.brain
        _place(anatomy, "oedema", (0.9 * halo).astype(np.float32), None)
    if diameter > 8 and rng.uniform() < 0.5:
        core = np.clip(0.5 + (depth - rng.uniform(1, 5)) / edge, 0, 1) * body
        _place(anatomy, "necrosis", core.astype(np.float32), None)
        body = np.clip(body - core, 0, 1)
    _place(anatomy, "lesion", body.astype(np.float32), _uptake(anatomy, level, rng, rng.uniform(0.05, 0.4)))
    anatomy.diameters.append(diameter)
    anatomy.labels[body > 0.5] = len(anatomy.diameters)


def _depth(
    shape: tuple[int, ...], centre: np.ndarray, radius: float, scenario: Scenario, rng: np.random.Generator
) -> Array:
    """Signed depth (mm, positive inside) of an irregular ellipsoid."""
    spacing = scenario.spacing_mm[::-1]
    stretch = rng.uniform(0.75, 1.3, 3)
    axes = [((np.arange(n) - c) * s * e) ** 2 for n, c, s, e in zip(shape, centre, spacing, stretch, strict=True)]
    distance = np.sqrt(axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :]).astype(np.float32)
    rough = smooth_field(shape, max(3.0, radius * 0.8), 0.2 * radius, rng) if radius > 3 else 0.0
    return np.asarray(radius - distance + rough, np.float32)


def _blob(
    shape: tuple[int, ...], centre: np.ndarray, diameter: float, scenario: Scenario, rng: np.random.Generator
) -> Array:
    return np.clip(0.5 + _depth(shape, centre, diameter / 2, scenario, rng), 0, 1)


def _image(anatomy: _Anatomy, scenario: Scenario, rng: np.random.Generator, *, whole: bool, standard: bool) -> Phantom:
    """Mix signals by fraction, blur, and acquire the images with independent noise."""
    ideal = {dose: np.zeros(anatomy.brain.shape, np.float32) for dose in (0.0, scenario.dose_fraction, 1.0)}
    r1, uptake = draw_relaxivity(scenario, rng), draw_uptake(scenario, rng)
    b1 = np.ones(anatomy.brain.shape, np.float32) if whole else _transmit_field(anatomy.brain.shape, rng)
    flow = draw_flow(scenario.sequence, rng)
    for name, fraction in anatomy.fractions.items():
        tissue = draw_tissue(name, scenario.field_strength_t, rng)
        if name == "blood":
            tissue = replace(tissue, pd=tissue.pd * flow)
        texture = 1 + smooth_field(fraction.shape, rng.uniform(2, 8), rng.uniform(0.01, 0.04), rng)
        amount, concentration = fraction * texture, anatomy.concentration.get(name)
        for dose in ideal:
            ideal[dose] += amount * _tissue_signal(tissue, scenario, concentration, dose * uptake, r1=r1, b1=b1)
    spread = _point_spread(rng, interpolated=0.0 if whole else INTERPOLATED)
    if whole:
        ideal = {dose: ndimage.gaussian_filter(image, spread) for dose, image in ideal.items()}
    else:
        window = _spectral_window(anatomy.brain.shape, spread, rng)
        ideal = {dose: fft.irfftn(fft.rfftn(image) * window, image.shape) for dose, image in ideal.items()}
    level = float(np.quantile(ideal[0.0][anatomy.brain], 0.9)) if anatomy.brain.sum() > 100 else 1.0
    bias = np.exp(smooth_field(anatomy.brain.shape, 40, rng.uniform(*RECEIVE_SPREAD), rng))
    ideal = {dose: (image * bias / level).astype(np.float32) for dose, image in ideal.items()}
    low = depart(ideal[0.0], ideal[scenario.dose_fraction], ideal[1.0], scenario.dose_fraction, rng)
    after = [low, ideal[1.0]] if standard else [low]
    (pre, low, *more), kept = _acquire(ideal[0.0], after, anatomy.brain, scenario, rng, spread=spread, whole=whole)
    return Phantom(
        scenario,
        pre,
        low,
        ((np.abs(ideal[1.0]) - np.abs(ideal[0.0])) * kept).astype(np.float32),
        anatomy.brain,
        anatomy.labels,
        tuple(anatomy.diameters),
        *more,
    )


def depart(before: Array, low: Array, full: Array, dose_fraction: float, rng: np.random.Generator) -> Array:
    """The low-dose image somewhere between the signal equations and enhancement in proportion to dose.

    How much a scanner's signal saturates follows from the equations only in part: the order of k-space, slice profile,
    inflow, water exchange and the vendor's filters are not in the header (ADR 14). Of the signed signal: across a null
    its magnitude is not in proportion.
    """
    proportional = before + np.float32(dose_fraction) * (full - before)
    return (low + np.float32(rng.uniform()) * (proportional - low)).astype(np.float32)


def _transmit_field(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Smooth transmit field (k, j, i) of a block, as a scale of the flip angle."""
    field = 1 + smooth_field(shape, 45, rng.uniform(*TRANSMIT_SPREAD), rng)
    return np.clip(field * rng.uniform(*TRANSMIT_MEAN), *B1_RANGE).astype(np.float32)


def _point_spread(rng: np.random.Generator, *, interpolated: float) -> Array:
    """Standard deviation (3,) in voxels along k, j, i.

    Scanners and software often interpolate one axis, mostly across the slices, to a finer grid than was measured: that
    of a share `interpolated` of the studies.
    """
    spread = np.full(3, rng.uniform(*PSF_VOXELS))
    if rng.uniform() < interpolated:
        spread[rng.integers(3)] = rng.uniform(*INTERPOLATED_VOXELS)
    return spread


def _spectral_window(shape: tuple[int, ...], spread: Array, rng: np.random.Generator) -> Array:
    """What a scanner keeps of k-space, for `rfftn`: a soft window, and in half of the studies a hard end (Gibbs).

    The truth passes through the same window: it is what the same scan of the standard dose would show without noise.
    """
    whole_band = np.full(3, 1.0)  # cycles per voxel; 0.5 is all there is
    ends = rng.uniform(0.35, 0.5, 3) if rng.uniform() < 0.5 else whole_band
    axes = [fft.fftfreq(n) for n in shape[:2]] + [fft.rfftfreq(shape[2])]
    k, j, i = (
        (np.exp(-2 * (np.pi * width * f) ** 2) * (np.abs(f) <= end)).astype(np.float32)
        for f, end, width in zip(axes, ends, spread, strict=True)
    )
    window: Array = k[:, None, None] * j[None, :, None] * i[None, None, :]
    return window


def _tissue_signal(
    tissue: Tissue, scenario: Scenario, concentration: Array | None, scale: float, *, r1: float, b1: Array
) -> Array:
    """Signal by linear interpolation over transmit field and concentration, to 1e-4 of the receiver's M0."""
    fields = np.linspace(*B1_RANGE, B1_NODES)
    at = (b1 - B1_RANGE[0]) * ((B1_NODES - 1) / (B1_RANGE[1] - B1_RANGE[0]))
    if concentration is None:
        curve = [signal(tissue, scenario.sequence, np.zeros(1), r1, float(field))[0] for field in fields]
        return np.interp(at, np.arange(B1_NODES), curve).astype(np.float32)
    top = float(concentration.max()) * scale + 1e-6
    grid = np.linspace(0, top, CURVE_NODES)
    table = np.stack([signal(tissue, scenario.sequence, grid, r1, float(field)) for field in fields])
    places = np.stack([at, concentration * np.float32(scale * (CURVE_NODES - 1) / top)])
    return ndimage.map_coordinates(table.astype(np.float32), places, order=1, mode="nearest")


def _defaced(brain: Mask, rng: np.random.Generator) -> Mask:
    """What software that removes faces leaves: the brain with some margin, and one half of what is around it."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in brain.shape), indexing="ij")
    normal = rng.standard_normal(3)
    plane = sum(n * axis for n, axis in zip(normal / np.linalg.norm(normal), axes, strict=True))
    kept: Mask = (plane > rng.uniform(-0.4, 0.2)) | ndimage.binary_dilation(brain, iterations=4)
    return kept


def _acquire(
    pre: Array,
    after: list[Array],
    brain: Mask,
    scenario: Scenario,
    rng: np.random.Generator,
    *,
    spread: Array,
    whole: bool,
) -> tuple[list[Array], Mask]:
    """Noise on every image; on those after contrast a gain and a residual misalignment, too, each with its own.

    What is drawn for the first two does not depend on whether there are more.

    Returns:
        The images, and what stripping and defacing left of the head: nothing enhances where nothing is.
    """
    shape = pre.shape
    drift = _drift(shape, rng)
    g_map = np.clip(1 + smooth_field(shape, 30, rng.uniform(0, 0.25), rng), 0.6, 2.5)
    blur = np.full(3, rng.uniform(0, 0.6))
    if rng.uniform() < 0.6:  # noise was there when an axis was interpolated, and not added later
        blur = np.where(spread > PSF_VOXELS[1], spread, blur)
    if scenario.stripped:
        pre = pre * brain
    moved = _placed(after[0], brain, scenario, rng)
    first = magnitude(pre, scenario.sigma, blur, g_map, rng)
    second = _received(moved, scenario.sigma, blur, g_map, rng)
    keep = np.ones(shape, bool)
    if scenario.stripped and rng.uniform() < 0.6:  # otherwise noise is left around the brain
        keep = ndimage.binary_dilation(np.abs(pre) > 0.02)
    elif not whole and not scenario.stripped and rng.uniform() < 0.15:
        keep = _defaced(brain, rng)
    images = [first * keep, (second * keep * drift).astype(np.float32)]
    for image, own in zip(after[1:], rng.spawn(len(after) - 1), strict=True):
        gain = _drift(shape, own)
        received = _received(_placed(image, brain, scenario, own), scenario.sigma, blur, g_map, own)
        images.append((received * keep * gain).astype(np.float32))
    return images, brain if scenario.stripped else keep


def _drift(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Gain of a later image over the first, nearly even."""
    return np.asarray(np.exp(smooth_field(shape, 45, rng.uniform(0, 0.02), rng)) * rng.uniform(0.85, 1.2))


def _placed(image: Array, brain: Mask, scenario: Scenario, rng: np.random.Generator) -> Array:
    """A later image as registration leaves it."""
    return _misalign(_cut_elsewhere(image, brain, rng) if scenario.stripped else image, scenario, rng)


def _received(image: Array, sigma: float, blur: Array, g_map: Array, rng: np.random.Generator) -> Array:
    """A later image with noise, which registration may have interpolated; the image itself is left to `_misalign`."""
    received = magnitude(image, sigma, blur, g_map, rng)
    if rng.uniform() < 0.7:
        ideal = np.abs(image)
        noise = ndimage.shift(received - ideal, rng.uniform(-0.5, 0.5, 3), order=3, mode="nearest")
        received = np.maximum(ideal + noise, 0)
    return received


def _cut_elsewhere(image: Array, brain: Mask, rng: np.random.Generator) -> Array:
    """The image cut to the brain on another grid, then brought to this one: interpolation rings at the cut."""
    apart = rng.uniform(-0.5, 0.5, 3)
    there = ndimage.shift(image, apart, order=3, mode="nearest")
    there *= ndimage.shift(brain.astype(np.float32), apart, order=1, mode="nearest") > 0.5
    return ndimage.shift(there, -apart, order=3, mode="nearest")


def _misalign(image: Array, scenario: Scenario, rng: np.random.Generator) -> Array:
    """Residual rigid error (0.05 to 0.3 mm, rarely 1 mm) and local non-rigid motion of up to 0.3 mm.

    As if all of it were motion: it moves the signed signal, where registration would interpolate its magnitude.
    """
    shape = image.shape
    size = 1.0 if rng.uniform() < 0.05 else rng.uniform(0.05, 0.3)
    spacing = scenario.spacing_mm[::-1]
    at = np.indices(shape, dtype=np.float32)
    for axis in range(3):
        local = smooth_field(shape, 15, rng.uniform(0, 0.15), rng)
        at[axis] += (rng.normal(0, size) + local) / spacing[axis]
    return ndimage.map_coordinates(image, at, order=3, mode="nearest").astype(np.float32)
