"""A head from the ICBM 152 maps: which tissue fills a voxel by how much, and how much of an agent it takes up.

Hides how one head is made from maps that average many: random orientation, scale and warp, sharpened tissue fractions,
and drawn structures (sulci, vessels, dura, falx, mucosa, scalp; solid, ringed and irregular lesions; T1-bright blood
and cavities that do not enhance). Must never know how the head is imaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from models.simulation.atlas import load_atlas
from models.simulation.physics import smooth_field
from models.simulation.scenario import Scenario
from models.volume import Array, Mask

TWIST_DEG, SCALE, WARP_MM = 15.0, 0.15, 2.5
# Concentrations at the standard dose, mM. 0.1 mmol/kg in an extracellular volume of 0.2 to 0.25 L/kg are .4 to .5 in
# plasma, of which whole blood holds 1 - haematocrit, more in the first minutes, and a lesion its extravascular share.
BLOOD_MM, LESION_MM = (0.2, 0.5), (0.03, 0.5)
DURA_MM, PIA_MM, CHOROID_MM, MUCOSA_MM = (0.1, 0.4), (0.05, 0.4), (0.2, 0.5), (0.1, 0.4)
ATROPHY = 4.0  # fluid of a head over that of the maps, at most: intracranial share about 10 to 30 %
PIAL_SHARE = 0.7  # of vessels
SMALL_MM = 6.0  # at least half of all lesions are below this
GRAIN_VOXELS, GRAIN = (1.0, 2.5), 0.6  # scale, and largest relative deviation, of uptake from one voxel to the next


@dataclass
class Anatomy:
    """Fractions per tissue (they sum to at most 1) and concentration at the standard dose per tissue (mM)."""

    fractions: dict[str, Array]
    concentration: dict[str, Array]
    brain: Mask
    labels: np.ndarray
    diameters: list[float]
    grain: Array  # of unit deviation: tissue is not uniform from one voxel to the next


def draw_anatomy(shape: tuple[int, int, int], scenario: Scenario, rng: np.random.Generator, *, whole: bool) -> Anatomy:
    """A head, or a part of one.

    Args:
        shape: (k, j, i) of the grid.
        scenario: its spacing, whether it is stripped, and how many lesions it has.
        rng: everything random follows from it.
        whole: upright and centred in the grid; otherwise randomly turned and placed.
    """
    points = _atlas_points(shape, scenario.spacing_mm, rng, whole=whole)
    anatomy = _tissues(points, scenario, rng)
    _add_vessels(anatomy, scenario, rng)
    _add_lesions(anatomy, scenario, rng)
    return anatomy


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


def _tissues(points: Array, scenario: Scenario, rng: np.random.Generator) -> Anatomy:
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
    anatomy = Anatomy(fractions, {}, brain, np.zeros(inside.shape, np.int16), [], grain)
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


def _add_meninges(anatomy: Anatomy, points: Array, inside: Array, scenario: Scenario, rng: np.random.Generator) -> None:
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


def _add_head(anatomy: Anatomy, inside: Array, scenario: Scenario, rng: np.random.Generator) -> None:
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


def _uptake(anatomy: Anatomy, level_mm: float, rng: np.random.Generator, spread: float = 0.25) -> Array:
    """Concentration at the standard dose (mM): a level with smooth heterogeneity and grain."""
    smooth = np.clip(1 + smooth_field(anatomy.brain.shape, 5, spread, rng), 0.2, 2.0)
    return (level_mm * smooth * np.clip(1 + rng.uniform(0, GRAIN) * anatomy.grain, 0.1, 2.5)).astype(np.float32)


def _place(anatomy: Anatomy, name: str, fraction: Array, concentration: Array | None) -> None:
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


def _add_vessels(anatomy: Anatomy, scenario: Scenario, rng: np.random.Generator) -> None:
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


def _add_lesions(anatomy: Anatomy, scenario: Scenario, rng: np.random.Generator) -> None:
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
    anatomy: Anatomy, centre: np.ndarray, diameter: float, scenario: Scenario, rng: np.random.Generator
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
