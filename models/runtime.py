"""Engines: from a prepared pair to the contrast signal of the standard dose.

Hides ONNX Runtime (providers, padding, tiles) and the linear engine. Both give a non-negative, finite signal on the
working grid that is zero outside the support. Must never return a signal that fails its own guards, and never depend
on whether a volume was tiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from scipy import ndimage

from models.card import Card, ModelError, read_card
from models.condition import HEADROOM, UNKNOWN_DOSE_FRACTION, Conditions, vector
from models.noise import smoothings
from models.preprocess import FractionDone, Prepared
from models.statistics import robust_std
from models.volume import Array, Mask

LINEAR_SIGMA_MM = 0.8
LINEAR_GATE = 2.0  # robust standard deviations of the smoothed subtraction
BYTES_PER_VOXEL = 450  # peak of the small network on the CPU, measured
_LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
CUDA = "CUDAExecutionProvider"
PROVIDERS: dict[str, dict[str, str]] = {  # in the order in which they are tried, with their options
    CUDA: {"use_tf32": "0"},  # TF32 keeps ten bits of a product, and the result would depend on the card
    "CPUExecutionProvider": {},
}
Box = tuple[slice, slice, slice]


class OutputError(ValueError):
    """The signal is not finite or not within the bound."""


class UnknownDoseError(ValueError):
    """The linear engine divides by the dose and has none."""


class Engine(Protocol):
    """What turns a prepared pair into a signal."""

    @property
    def name(self) -> str:
        """Short name for reports: the model id or `linear`."""

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the computation."""

    @property
    def version(self) -> str:
        """Version of the computation, for people."""

    @property
    def card_digest(self) -> str | None:
        """SHA-256 of the model card; None where there is none."""

    @property
    def provider(self) -> str:
        """What computes: the same network differs in its last digits from one to another."""

    @property
    def notice(self) -> str:
        """What must be said about the use of its results."""

    def predict(self, prepared: Prepared, conditions: Conditions, progress: FractionDone = lambda _: None) -> Array:
        """Contrast signal of the standard dose on the working grid, (k, j, i), white matter = 1."""


@dataclass(frozen=True)
class LinearEngine:
    """The baseline: subtraction smoothed with a 0.8 mm Gaussian, gated by noise, divided by the dose fraction."""

    name: str = "linear"
    digest: str = "linear-1"
    version: str = "1"
    card_digest: str | None = None
    provider: str = "NumPy"
    notice: str = "research use, not a medical device"

    def predict(self, prepared: Prepared, conditions: Conditions, progress: FractionDone = lambda _: None) -> Array:
        """See `Engine`.

        Raises:
            UnknownDoseError: dose or agent is unknown.
        """
        if conditions.dose_fraction is None:
            raise UnknownDoseError("the linear engine needs dose and agent")
        subtraction = prepared.comparison.subtraction
        signal = linear(subtraction, prepared.brain, prepared.pre.spacing_mm, conditions.dose_fraction)
        progress(1.0)
        return _guard(signal * prepared.support)


def linear(subtraction: Array, brain: Mask, spacing_mm: tuple[float, float, float], dose_fraction: float) -> Array:
    """Smoothed, gated linear amplification; arrays (k, j, i), spacing along i, j, k."""
    smooth = ndimage.gaussian_filter(subtraction, [LINEAR_SIGMA_MM / s for s in spacing_mm[::-1]])
    return np.where(smooth > LINEAR_GATE * robust_std(smooth[brain]), smooth / dose_fraction, 0).astype(np.float32)


class NetworkEngine:
    """An exported network under ONNX Runtime: CUDA where there is one, else CPU; whole volume where memory allows.

    Under CUDA the fp16 network runs where the card offers one; its digest is the engine's.
    """

    def __init__(self, folder: Path, *, memory_bytes: int = 3 << 30, threads: int = 0) -> None:
        """Load a model folder.

        Args:
            folder: holds card.toml and model.onnx.
            memory_bytes: what activations may take; larger volumes are tiled.
            threads: of the CPU provider; 0 is all cores.

        Raises:
            ModelError: the folder fails a check or ONNX Runtime cannot load the network.
        """
        self.card: Card = read_card(folder)
        self._memory_bytes = memory_bytes
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._options = options
        self._session, self.precision = self._open("fp32"), "fp32"
        if choose_precision(self.card, self.provider) == "fp16":
            self._session, self.precision = self._open("fp16"), "fp16"

    def _open(self, precision: str) -> ort.InferenceSession:
        path, _ = self.card.networks[precision]
        available = [p for p in PROVIDERS if p in ort.get_available_providers()]
        try:
            session = ort.InferenceSession(
                str(path), self._options, providers=available, provider_options=[PROVIDERS[p] for p in available]
            )
        except _LOAD_ERRORS as error:
            raise ModelError(f"ONNX Runtime cannot load model {self.card.id}: {type(error).__name__}") from error
        said = session.get_modelmeta().custom_metadata_map
        for name, expected in (("opset", self.card.opset), ("contract", self.card.contract)):
            if said.get(name) != str(expected):
                raise ModelError(f"model {self.card.id}: {name} is {said.get(name)}, the card says {expected}")
        return session

    @property
    def name(self) -> str:
        """The model id."""
        return self.card.id

    @property
    def digest(self) -> str:
        """SHA-256 of the network in use, which tells its precision."""
        return self.card.networks[self.precision][1]

    @property
    def version(self) -> str:
        """The version that the card states."""
        return self.card.version

    @property
    def card_digest(self) -> str | None:
        """SHA-256 of card.toml."""
        return self.card.digest

    @property
    def notice(self) -> str:
        """The intended use that the card states."""
        return self.card.intended_use

    @property
    def provider(self) -> str:
        """The execution provider of ONNX Runtime in use."""
        return str(self._session.get_providers()[0])

    def predict(self, prepared: Prepared, conditions: Conditions, progress: FractionDone = lambda _: None) -> Array:
        """See `Engine`.

        Raises:
            OutputError: the network gave a value that is not finite, negative or above the bound.
        """
        comparison = prepared.comparison
        images = np.stack([comparison.subtraction, prepared.pre.voxels, comparison.sigma_map])
        signal = self.run(images, vector(conditions), progress)
        if (signal > self._bound(comparison.subtraction, conditions.dose_fraction)).any():
            raise OutputError("the signal exceeds the bound that the measured uptake sets")
        return _guard(signal * prepared.support)

    def run(self, images: Array, condition: Array, progress: FractionDone = lambda _: None) -> Array:
        """The network alone: images (3, k, j, i) and condition vector to signal (k, j, i)."""
        shape = images.shape[1:]
        padded = self._padded(images)
        out = np.zeros(padded.shape[1:], np.float32)
        tiles = list(self.tiles(padded.shape[1:]))
        for count, (read, write, core) in enumerate(tiles, 1):
            feed = {"images": np.ascontiguousarray(padded[:, *read][None]), "condition": condition[None]}
            out[write] = self._session.run(["signal"], feed)[0][0, 0][core]
            progress(count / len(tiles))
        return out[tuple(slice(0, n) for n in shape)]

    def _bound(self, subtraction: Array, dose_fraction: float | None) -> Array:
        """The bound on the padded volume, as the network sees it: at an edge the smoothings depend on the padding."""
        bound = upper_bound(self._padded(subtraction[None])[0], dose_fraction)
        return bound[tuple(slice(0, n) for n in subtraction.shape)]

    def _padded(self, images: Array) -> Array:
        sides = [(0, -n % self.card.stride) for n in images.shape[1:]]
        return np.pad(images, [(0, 0), *sides], mode="edge")

    def tiles(self, shape: tuple[int, ...]) -> Iterator[tuple[Box, Box, Box]]:
        """(read, write, core of what was read) boxes that cover the volume; one box where memory allows.

        The largest halo-free core that fits is chosen; halves of the longest side until it does.
        """
        stride, halo = self.card.stride, self.card.halo_voxels
        limit = self._memory_bytes / BYTES_PER_VOXEL
        core = list(shape)
        while np.prod([min(c + 2 * halo, n) for c, n in zip(core, shape, strict=True)]) > limit and max(core) > 16:
            longest = int(np.argmax(core))
            core[longest] = -(-core[longest] // 2 // stride) * stride
        for start in np.ndindex(*(-(-n // c) for n, c in zip(shape, core, strict=True))):
            write = [slice(s * c, min(s * c + c, n)) for s, c, n in zip(start, core, shape, strict=True)]
            read = [slice(max(0, w.start - halo), min(n, w.stop + halo)) for w, n in zip(write, shape, strict=True)]
            inner = [slice(w.start - r.start, w.stop - r.start) for w, r in zip(write, read, strict=True)]
            yield tuple(read), tuple(write), tuple(inner)  # type: ignore[misc]


def choose_precision(card: Card, provider: str) -> str:
    """fp16 where the card offers it and the provider is CUDA; a CPU computes fp16 no faster."""
    return "fp16" if provider == CUDA and "fp16" in card.networks else "fp32"


def upper_bound(subtraction: Array, dose_fraction: float | None) -> Array:
    """What no signal may exceed: 1.5 over the dose fraction, times the largest of the subtraction and three smoothings.

    The same bound is part of the exported graph; a network that a site brings need not have it, so it is checked here.
    A rounding margin of 1e-3 of white matter is added.

    Args:
        subtraction: (k, j, i), white matter = 1.
        dose_fraction: of the standard dose; None where it is unknown.
    """
    once, twice, wide = smoothings(subtraction)
    measured = np.maximum(np.maximum(subtraction, once), np.maximum(twice, wide))
    bound: Array = np.maximum(measured, 0) * np.float32(HEADROOM / (dose_fraction or UNKNOWN_DOSE_FRACTION) * 1.001)
    return bound + np.float32(1e-3)


def at_dose(signal: Array, prepared: Prepared, conditions: Conditions, factor: float) -> Array:
    """The signal of another dose than the standard one, in proportion; what it gains ends at the bound (ADR 4).

    A signal that is above the bound already (of the linear engine, which has none) gains nothing. Enhancement grows
    less than in proportion to dose, so that a factor above 1 rather shows too much than too little.

    Args:
        signal: of the standard dose, (k, j, i), white matter = 1.
        prepared: the pair.
        conditions: of the acquisition.
        factor: simulated dose in standard doses; up to HEADROOM.
    """
    if factor == 1:
        return signal
    bound = upper_bound(prepared.comparison.subtraction, conditions.dose_fraction)
    scaled: Array = np.minimum(signal * np.float32(factor), np.maximum(bound, signal * np.float32(min(factor, 1))))
    return scaled


def _guard(signal: Array) -> Array:
    if not np.isfinite(signal).all():
        raise OutputError("the signal is not finite")
    if float(signal.min()) < 0:
        raise OutputError("the signal is negative")
    return signal.astype(np.float32)
