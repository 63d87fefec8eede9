"""Derived classic MR images: a source series plus a contrast signal, or the signal alone.

Hides how the values are found that `attributes` says are derived from the pixels: the sum in the stored units of the
source, window, extremes, watermark. Must never change a stored value to which nothing was added, but for the
watermark outside the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from models.volume import Array
from service.core.dicom.values import items, number, texts
from service.core.errors import Permanent, Reason
from service.core.job import Kind
from worker.compose import watermark
from worker.compose.attributes import fill_table
from worker.compose.context import DerivationContext
from worker.compose.provenance import (
    add_marks,
    code,
    derivation,
    identify,
    name_instance,
    partners,
    referenced_series,
    source_image,
)
from worker.read.study import Series

MR_SERIES = (Kind.SD, Kind.SD_PLUS, Kind.SUBTRACTION)


def derive(
    kind: Kind, source: Series, signal: Array, other: Series, context: DerivationContext, *, watermarked: bool = False
) -> Iterator[Dataset]:
    """The derived series, slice by slice in ascending order, ready to be saved.

    Args:
        kind: SD (source is the pre-contrast series), SD_PLUS (source is the low-dose series) or SUBTRACTION (the signal
            alone; source is the pre-contrast series).
        source: the series whose voxels the signal is added to; gives geometry, patient and study.
        signal: (k, j, i) on the grid of `source.volume()`, in its unit.
        other: the partner of the pair.
        context: what made the signal.
        watermarked: whether "SYNTHETIC - NOT ACQUIRED" is burned in outside the head.

    Raises:
        ValueError: the signal has another shape than the source.
        Permanent: OUTPUT_INVALID when the signal is not finite.
    """
    if signal.shape != (len(source.planes), *source.planes[0].stored.shape):
        raise ValueError(f"signal {signal.shape} is not on the grid of the source")
    if not np.isfinite(signal).all():
        raise Permanent(Reason.OUTPUT_INVALID, "the signal is not finite")
    pixels = _add(source, signal, alone=kind is Kind.SUBTRACTION)
    low = source if kind is Kind.SD_PLUS else other
    shared = identify(kind, source, other, context) | _of_series(source, other, low, context) | _of_pixels(pixels)
    shown, note = _stamp(source, signal, pixels) if watermarked else (pixels.voxels, "")
    shared |= derivation(kind, context, pixels.note + note)
    for index, (plane, partner) in enumerate(zip(source.planes, partners(source, other), strict=True)):
        values = shared | _of_slice_pixels(shown[index])
        values["SOPInstanceUID"] = name_instance(shared["SeriesInstanceUID"], plane)
        values["InstanceNumber"] = index + 1
        values["SourceImageSequence"] = [source_image(plane, moved=False), source_image(partner, moved=True)]
        values["ReferencedSeriesSequence"] = referenced_series([(source, plane), (other, partner)])
        instance = fill_table(plane.header, low.header, values)
        add_marks(instance, kind, context, hashlib.sha256(_encoded(pixels.voxels[index])).hexdigest())
        yield instance


def _of_series(source: Series, other: Series, low: Series, context: DerivationContext) -> dict[str, Any]:
    """What the images of one series share beside what all results share."""
    return {
        "ImageType": ["DERIVED", "SECONDARY", "OTHER", context.mark.replace(" ", "_")],
        "ContrastBolusAgent": _agent_text(low.header) or context.agent or "",
        "ContrastBolusAgentSequence": _agent_codes(low.header) or None,
        **lossy([source, other]),
    }


def _agent_text(low_header: Dataset) -> str | bytes:
    """The agent's text in one value; as it is written where it is not in the stated character set."""
    written = low_header.get("ContrastBolusAgent")
    return written if isinstance(written, bytes) else " ".join(texts(low_header, "ContrastBolusAgent"))[:64]


def _agent_codes(low_header: Dataset) -> list[Dataset]:
    """The agent's codes alone; Enhanced MR keeps volumes beside them, which have their own place in classic MR."""
    return [
        code(item.CodeValue, item.CodingSchemeDesignator, item.get("CodeMeaning", ""))
        for item in items(low_header, "ContrastBolusAgentSequence")
        if "CodeValue" in item and "CodingSchemeDesignator" in item
    ]


def lossy(pair: Sequence[Series]) -> dict[str, Any]:
    """What the lossy compression of any source leaves to say (C.7.6.1.1.5)."""
    keywords = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
    for series in pair:
        for plane in series.planes:
            if texts(plane.header, keywords[0]) == ["01"]:
                return {keyword: texts(plane.header, keyword) or None for keyword in keywords}
    return dict.fromkeys(keywords) | {keywords[0]: "00"}


@dataclass(frozen=True)
class _Pixels:
    """Stored values (k, j, i) of the derived series."""

    voxels: npt.NDArray[np.integer]
    note: str  # how they differ from plain addition; empty when they do not


def _add(source: Series, signal: Array, *, alone: bool) -> _Pixels:
    """Stored values of the source plus the signal in the source's stored units, rounded; or that signal alone.

    Where the rounded signal is 0 the stored value is that of the source, bit for bit. Only when slices are scaled
    differently, or the sum does not fit 16 bits, one linear map is applied to the whole series, and `note` says so.
    """
    scales = np.array([(plane.unit_per_stored, plane.unit_offset) for plane in source.planes])
    signed = number(source.header, "PixelRepresentation") == 1
    limits = np.iinfo(np.int16 if signed else np.uint16)
    if np.ptp(scales, axis=0).any():
        unit = float(np.abs(scales[:, 0]).max())
        base = np.stack([np.rint(plane.in_units() / unit) for plane in source.planes])
        note = " Slices scaled differently in the source have one common scale here."
    else:
        unit, note = float(scales[0, 0]), ""
        base = np.stack([plane.stored for plane in source.planes]).astype(np.float64)
    summed = np.rint(signal / unit) + (0 if alone else base)
    largest = np.abs(summed).max() if signed else summed.max()
    if largest > limits.max:
        summed = np.rint(summed * (limits.max / float(largest)))
        note += f" All stored values were multiplied by {limits.max / float(largest):.6g} to fit 16 bits."
    return _Pixels(summed.clip(limits.min, limits.max).astype(limits.dtype), note)


def _stamp(source: Series, signal: Array, pixels: _Pixels) -> tuple[npt.NDArray[np.integer], str]:
    """The stored values with the watermark burned in at the top of the window, and what the description says of it."""
    text = watermark.place(watermark.find_head(source.volume()) | (signal > 0))
    missing = int((~text.any(axis=(1, 2))).sum())
    note = f" No room for the watermark in {missing} of {len(text)} images." if missing else ""
    if missing < len(text):
        note = f" {watermark.NOTE}{note}"
    return np.where(text, np.asarray(_window(pixels)[1], pixels.voxels.dtype), pixels.voxels), note


def _window(pixels: _Pixels) -> tuple[float, float]:
    """Darkest and brightest value of the window of the series."""
    sample = pixels.voxels[::2, ::2, ::2]
    head = sample[sample > 0]
    bottom, top = np.percentile(head, (1, 99.8)) if head.size else (0, 1)
    return float(bottom), float(top)


def _of_pixels(pixels: _Pixels) -> dict[str, Any]:
    """What describes the pixels of the whole series."""
    bottom, top = _window(pixels)
    width = max(round(top - bottom), 1)
    return {
        "PixelRepresentation": int(pixels.voxels.dtype.kind == "i"),
        "WindowCenter": str(round(bottom + width / 2)),
        "WindowWidth": str(width),
    }


def _of_slice_pixels(voxels: npt.NDArray[np.integer]) -> dict[str, Any]:
    return {
        "PixelData": _encoded(voxels),
        "SmallestImagePixelValue": int(voxels.min()),
        "LargestImagePixelValue": int(voxels.max()),
    }


def _encoded(voxels: npt.NDArray[np.integer]) -> bytes:
    return voxels.astype(voxels.dtype.newbyteorder("<")).tobytes()
