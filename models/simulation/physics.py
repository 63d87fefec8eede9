"""Signal equations, tissue constants and the image formation of the simulator.

Hides the physics: SPGR, MPRAGE (IR-SPGR) and spin-echo signal as functions of R1, and what an acquisition adds to the
ideal image (point spread, correlated Rician noise, bias and gain fields, residual motion). Equations run on NumPy
arrays and on torch tensors alike (array API). Must never use global random state: the generator is passed in.

A turbo spin echo is taken for a spin echo: recovery begins after its last echo, as if TR were shorter by the train of
echoes, some 0.05 s of 0.45 to 0.75 s, and TE is that of the centre of k-space.

Sources. SPGR: Ernst and Anderson 1966. MPRAGE: steady state of a train of N low-angle readouts after an inversion
every TR, as in Deichmann et al., NeuroImage 2000;12:112-127. T1 of white and grey matter, blood, fluid, fat and muscle:
Stanisz et al. 2005, Gach 2008, Lu et al. 2004; widened, because published white-matter T1 at 3 T spans 0.6 to 1.1 s.
Assumed, not measured: the rows dura, pia, mucosa, bone, lesion, oedema, necrosis and haemorrhage, all proton densities
and T2*, and one transverse relaxivity for all agents (published in plasma: 4.4 to 15 /(mM s)). The transmit field
scales the angle of gradient echoes; a spin echo is taken as nominal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from scipy import ndimage

from models.volume import Array


@dataclass(frozen=True)
class Sequence:
    """Parameters of one T1 sequence. Times in s, angle in degrees."""

    kind: str  # SPGR, MPRAGE or SE
    tr_s: float
    te_s: float
    flip_deg: float = 90.0
    ti_s: float = 0.0
    echo_spacing_s: float = 0.008
    readouts: int = 160
    inversion_efficiency: float = 1.0
    states_readouts: bool = False  # the header's RepetitionTime is the time between readouts, not between inversions
    states_delay: bool = False  # its InversionTime is the delay to the first readout, not to the centre of k-space

    @property
    def stated(self) -> dict[str, float | None]:
        """RepetitionTime, EchoTime, InversionTime, FlipAngle as a header gives them, in the names of `Conditions`."""
        prepared = self.kind == "MPRAGE"
        inversion = self.preparation_s if self.states_delay else self.ti_s
        return {
            "repetition_time_s": self.echo_spacing_s if prepared and self.states_readouts else self.tr_s,
            "echo_time_s": self.te_s,
            "inversion_time_s": inversion if prepared and inversion > 0 else None,
            "flip_angle_deg": self.flip_deg,
        }

    @property
    def preparation_s(self) -> float:
        """From the inversion to the first readout."""
        return max(self.ti_s - self.readouts // 2 * self.echo_spacing_s, 0.0)


@dataclass(frozen=True)
class Tissue:
    """Constants of one tissue at one field strength."""

    pd: float
    t1_s: float
    t2_s: float  # T2* for gradient echoes; T2 for spin echo is taken as 1.5 times it
    r2_per_mm_s: float = 7.0  # transverse relaxivity, 1/(mM s): minor at the TE used


# (PD low, PD high, T1 at 1.5 T low, high, T1 at 3 T low, high, T2* at 3 T low, high); seconds.
TISSUES: dict[str, tuple[float, ...]] = {
    "white": (0.62, 0.70, 0.60, 0.90, 0.75, 1.10, 0.045, 0.055),
    "grey": (0.75, 0.82, 0.95, 1.25, 1.25, 1.85, 0.050, 0.065),
    "csf": (0.95, 1.00, 3.5, 4.5, 3.5, 4.5, 0.5, 1.0),
    "blood": (0.85, 0.95, 1.35, 1.55, 1.50, 1.75, 0.02, 0.10),
    "dura": (0.30, 0.75, 0.90, 1.20, 1.10, 1.40, 0.02, 0.04),  # much of its fibre decays before any usual echo
    "pia": (0.75, 0.95, 1.00, 1.40, 1.20, 1.80, 0.04, 0.08),  # small vessels and membranes on the cortex
    "mucosa": (0.80, 0.95, 1.00, 1.30, 1.20, 1.60, 0.04, 0.08),
    "fat": (0.90, 1.00, 0.25, 0.30, 0.32, 0.40, 0.02, 0.04),
    "muscle": (0.75, 0.85, 0.95, 1.10, 1.30, 1.50, 0.02, 0.04),
    "bone": (0.05, 0.15, 0.30, 0.60, 0.30, 0.60, 0.005, 0.01),
    "lesion": (0.80, 0.95, 1.10, 1.50, 1.30, 2.00, 0.06, 0.10),
    "oedema": (0.80, 0.90, 1.15, 1.45, 1.35, 1.75, 0.07, 0.11),
    "necrosis": (0.90, 0.98, 2.0, 3.0, 2.5, 3.5, 0.10, 0.30),
    "haemorrhage": (
        0.80,
        0.95,
        0.35,
        0.60,
        0.40,
        0.70,
        0.02,
        0.05,
    ),  # T1-bright without uptake (also melanin, fat drops)
}


def draw_tissue(name: str, field_strength_t: float, rng: np.random.Generator) -> Tissue:
    """Constants of a tissue at a field strength, drawn from its range; T1 goes as a power of B between 1.5 and 3 T."""
    pd_low, pd_high, low_15, high_15, low_3, high_3, t2_low, t2_high = TISSUES[name]
    place = rng.uniform()
    at_15, at_3 = low_15 + place * (high_15 - low_15), low_3 + place * (high_3 - low_3)
    exponent = np.log(at_3 / at_15) / np.log(2.0)
    t1 = at_15 * (field_strength_t / 1.5) ** exponent
    return Tissue(float(rng.uniform(pd_low, pd_high)), float(t1), float(rng.uniform(t2_low, t2_high)))


def draw_sequence(rng: np.random.Generator) -> Sequence:
    """A plausible clinical T1 sequence."""
    kind = rng.choice(["MPRAGE", "SPGR", "SE"], p=[0.5, 0.35, 0.15])
    if kind == "MPRAGE":
        tau, ti = rng.uniform(0.006, 0.009), rng.uniform(0.6, 1.1)  # the shorter, the darker is what relaxes slowly
        readouts = min(int(rng.integers(128, 208)), int(2 * ti / tau))
        tr = max(rng.uniform(1.5, 3.0), ti + tau * readouts * 0.6 + 0.1)
        return Sequence(
            "MPRAGE", tr, rng.uniform(0.002, 0.004), rng.uniform(7, 12), ti, tau, readouts, rng.uniform(0.9, 1)
        )
    if kind == "SPGR":
        return Sequence("SPGR", rng.uniform(0.005, 0.012), rng.uniform(0.002, 0.005), rng.uniform(10, 25))
    return Sequence("SE", rng.uniform(0.45, 0.75), rng.uniform(0.008, 0.017))


def signal(tissue: Tissue, sequence: Sequence, concentration_mm: Any, r1_per_mm_s: float, b1: Any = 1.0) -> Any:
    """Signal of a tissue that holds `concentration_mm` of an agent, in units of the receiver's M0.

    After an inversion it can be negative: the magnitude is that of a voxel's mixture (`magnitude`), not of its parts.

    Args:
        tissue: constants without contrast.
        sequence: SPGR, MPRAGE or SE.
        concentration_mm: mmol/L, array.
        r1_per_mm_s: longitudinal relaxivity, 1/(mM s).
        b1: transmit scale, number or array.
    """
    xp = array_namespace(concentration_mm)
    r1 = 1 / tissue.t1_s + r1_per_mm_s * concentration_mm
    r2 = 1 / tissue.t2_s + tissue.r2_per_mm_s * concentration_mm
    if sequence.kind == "SE":
        slow = 1 / (1.5 * tissue.t2_s) + tissue.r2_per_mm_s * concentration_mm
        return tissue.pd * (1 - xp.exp(-sequence.tr_s * r1)) * xp.exp(-sequence.te_s * slow)
    angle = sequence.flip_deg * np.pi / 180 * b1
    ideal = _spgr(xp, sequence, r1, angle) if sequence.kind == "SPGR" else _mprage(xp, sequence, r1, angle)
    return tissue.pd * ideal * xp.exp(-sequence.te_s * r2)


def _trig(xp: Any, angle: Any) -> tuple[Any, Any]:
    return (np.sin(angle), np.cos(angle)) if isinstance(angle, float) else (xp.sin(angle), xp.cos(angle))


def _spgr(xp: Any, sequence: Sequence, r1: Any, angle: Any) -> Any:
    """Sin a (1 - E1) / (1 - cos a E1)."""
    sine, cosine = _trig(xp, angle)
    e1 = xp.exp(-sequence.tr_s * r1)
    return sine * (1 - e1) / (1 - cosine * e1)


def _mprage(xp: Any, sequence: Sequence, r1: Any, angle: Any) -> Any:
    """At the centre of k-space of an inversion-prepared train in its steady state; negative before the null."""
    sine, cosine = _trig(xp, angle)
    tau, n = sequence.echo_spacing_s, sequence.readouts
    centre = n // 2
    before = sequence.preparation_s
    after = max(sequence.tr_s - before - n * tau, 0.0)
    e0, et, er = xp.exp(-before * r1), xp.exp(-tau * r1), xp.exp(-after * r1)
    q = et * cosine
    a, b = (1 - et) * (1 - q**n) / (1 - q), q**n
    inv = sequence.inversion_efficiency
    steady = (1 - er + er * (b * (1 - e0) + a)) / (1 + inv * er * b * e0)
    start = 1 - (1 + inv * steady) * e0
    return sine * (start * q**centre + (1 - et) * (1 - q**centre) / (1 - q))


def smooth_field(shape: tuple[int, ...], scale_voxels: float, amplitude: float, rng: np.random.Generator) -> Array:
    """A smooth random field of zero mean and standard deviation `amplitude`, structure of about `scale_voxels`."""
    knots = [int(np.ceil(n / scale_voxels)) + 4 for n in shape]
    field = rng.standard_normal(knots).astype(np.float32)
    for axis, (n, m) in enumerate(zip(shape, knots, strict=True)):
        field = np.moveaxis(np.tensordot(_spline_matrix(n, m, scale_voxels), field, (1, axis)), 0, axis)
    return (amplitude * field / 0.32).astype(np.float32)  # 0.32: what the spline leaves of a unit normal in 3-D


def _spline_matrix(size: int, knots: int, scale_voxels: float) -> Array:
    """Cubic B-spline weights (size, knots) of positions 0..size-1 over knots `scale_voxels` apart."""
    at = np.arange(size)[:, None] / scale_voxels + 1.5 - np.arange(knots)[None, :]
    x = np.abs(at)
    near, far = 2 / 3 - x**2 + x**3 / 2, np.maximum(2 - x, 0) ** 3 / 6
    return np.where(x < 1, near, far).astype(np.float32)


def correlated_noise(shape: tuple[int, ...], sigma: float, blur_voxels: Array, rng: np.random.Generator) -> Array:
    """Gaussian noise of standard deviation `sigma`, blurred along k, j, i (3,) and brought back to it."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if max(blur_voxels) > 0.2:
        noise = ndimage.gaussian_filter(noise, blur_voxels)
    return (noise * (sigma / max(float(noise.std()), 1e-9))).astype(np.float32)


def magnitude(ideal: Array, sigma: float, blur_voxels: Array, g_map: Array, rng: np.random.Generator) -> Array:
    """Rician image: magnitude of the ideal image plus complex noise, both channels drawn independently."""
    real = ideal + g_map * correlated_noise(ideal.shape, sigma, blur_voxels, rng)
    imaginary = g_map * correlated_noise(ideal.shape, sigma, blur_voxels, rng)
    return np.sqrt(real**2 + imaginary**2).astype(np.float32)
