"""What headers alone tell about series: which is one whole regular volume and looks like T1, which two are a pair.

Hides what makes planes one regular volume (PS3.3 C.7.6.2.1.1). Pure Python over a summary of numbers, so that intake
can ask again whenever an image arrives. Must never touch pixels, and never keep anything that identifies a patient: a
summary is stored in the ledger. It only decides *when* to start; the worker decides from the images whether it may.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Self

from pydantic import TypeAdapter
from pydicom.dataset import Dataset

from service.core.dicom.header import has_contrast, is_synthetic, why_not_t1
from service.core.dicom.values import number, texts, values
from service.core.errors import Reason

Vector = tuple[float, float, float]

STEP_TOLERANCE = 0.05  # of the distance between planes; scanners round positions to 0.001..0.05 mm
DRIFT_TOLERANCE_MM = 0.25  # planes of one volume lie exactly above each other
COSINE_TOLERANCE = 1e-3
SPACING_TOLERANCE_MM = 1e-3
MIN_PLANES = 8  # fewer is a localizer, not a volume of the brain


@dataclass(frozen=True)
class Fault:
    """Why a series is not one whole regular volume."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class HeaderSummary:
    """What intake needs to know of one object, all frames of it."""

    positions_mm: tuple[Vector, ...] = ()  # ImagePositionPatient of each frame
    orientation: tuple[float, ...] = ()  # ImageOrientationPatient: six cosines; empty when absent or not the same
    pixel_spacing_mm: tuple[float, ...] = ()  # between rows, between columns
    rows: int = 0
    columns: int = 0
    frame_of_reference_uid: str = ""
    images_in_acquisition: int | None = None
    concatenation: tuple[str, int, int] | None = None  # its UID, which of its objects this is, how many there are
    looks_t1: bool = False  # and is acquired: neither derived nor a localizer
    has_contrast: bool = False
    role: str = ""  # by the site's protocols: pre, low, ignore or unclear; added where the settings are known
    is_synthetic: bool = False  # made by lowgad or its like: see `service.core.dicom.header.is_synthetic`

    @classmethod
    def of(cls, header: Dataset) -> Self:
        """Summarise a header. What is missing or unreadable is left empty."""
        orientations = set(_vectors(header, "ImageOrientationPatient", 6))
        return cls(
            positions_mm=tuple((x, y, z) for x, y, z in _vectors(header, "ImagePositionPatient", 3)),
            orientation=orientations.pop() if len(orientations) == 1 else (),
            pixel_spacing_mm=next(_vectors(header, "PixelSpacing", 2), ()),
            rows=int(number(header, "Rows") or 0),
            columns=int(number(header, "Columns") or 0),
            frame_of_reference_uid="".join(texts(header, "FrameOfReferenceUID")[:1]),
            images_in_acquisition=int(number(header, "ImagesInAcquisition") or 0) or None,
            concatenation=_concatenation(header),
            looks_t1=not why_not_t1(header),
            has_contrast=has_contrast(header),
            is_synthetic=is_synthetic(header),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HeaderSummary:
        """The inverse of `to_json`."""
        return _ADAPTER.validate_python(value)

    def to_json(self) -> dict[str, Any]:
        """As the ledger keeps it."""
        return asdict(self)


_ADAPTER = TypeAdapter(HeaderSummary)


def geometry_faults(summaries: Sequence[HeaderSummary]) -> list[Fault]:
    """Why these objects are not one whole regular volume; empty when they are."""
    first = summaries[0]
    if not all(item.positions_mm and item.orientation and item.pixel_spacing_mm for item in summaries):
        return [Fault(Reason.IRREGULAR_GEOMETRY, "an image without position, orientation or spacing")]
    if not all(_same_grid(first, item, COSINE_TOLERANCE) for item in summaries):
        return [Fault(Reason.IRREGULAR_GEOMETRY, "orientation, matrix or pixel spacing differ between images")]
    positions = [position for item in summaries for position in item.positions_mm]
    if absent := count_fault(summaries):
        return [absent]
    if len(positions) < MIN_PLANES:
        return [Fault(Reason.MISSING_SLICES, f"{len(positions)} of at least {MIN_PLANES} images")]
    return list(_stack_faults(positions, first.orientation))


def count_fault(summaries: Sequence[HeaderSummary]) -> Fault | None:
    """Images of an acquisition, or objects of a concatenation, that are announced and are not there."""
    images = sum(len(item.positions_mm) for item in summaries)
    expected = max(item.images_in_acquisition or 0 for item in summaries)
    if images < expected:
        return Fault(Reason.MISSING_SLICES, f"{images} of {expected} images")
    announced = [item.concatenation for item in summaries if item.concatenation]
    for name in {uid for uid, _, _ in announced}:
        present = {number for uid, number, _ in announced if uid == name}
        total = max(max(number, count) for uid, number, count in announced if uid == name)
        if len(present) < total:
            return Fault(Reason.MISSING_SLICES, f"{len(present)} of {total} objects of a concatenation")
    return None


def find_pair(series: Mapping[str, Sequence[HeaderSummary]]) -> tuple[str, str] | None:
    """The pre-contrast and the low-dose series, where headers leave no doubt: one pair of whole T1 volumes that agree.

    Args:
        series: summaries by SeriesInstanceUID.

    Returns:
        The two SeriesInstanceUIDs, pre-contrast first; None when there is no such pair or more than one.
    """
    volumes = {uid: items for uid, items in series.items() if _is_t1_volume(items)}
    pairs = [
        (pre, low)
        for pre, pre_items in volumes.items()
        for low, low_items in volumes.items()
        if _may_be(pre_items[0], "pre") and _may_be(low_items[0], "low") and _agree(pre_items, low_items)
    ]
    return pairs[0] if len(pairs) == 1 else None


def _is_t1_volume(items: Sequence[HeaderSummary]) -> bool:
    kind = {(item.looks_t1, item.has_contrast, item.role, item.is_synthetic) for item in items}
    is_t1 = items[0].looks_t1 or items[0].role in {"pre", "low"}
    return len(kind) == 1 and is_t1 and not items[0].is_synthetic and not geometry_faults(items)


def _may_be(item: HeaderSummary, role: str) -> bool:
    """By the site's protocols, or where they are silent by its contrast attributes."""
    return item.role == role if item.role else item.has_contrast == (role == "low")


def _agree(one: Sequence[HeaderSummary], other: Sequence[HeaderSummary]) -> bool:
    """Same frame of reference, orientation, matrix, spacing and number of planes. Registration does the rest."""
    a, b = one[0], other[0]
    planes = [sum(len(item.positions_mm) for item in items) for items in (one, other)]
    same_frame = a.frame_of_reference_uid == b.frame_of_reference_uid
    return same_frame and planes[0] == planes[1] and _same_grid(a, b, 10 * COSINE_TOLERANCE)


def _same_grid(a: HeaderSummary, b: HeaderSummary, cosine_tolerance: float) -> bool:
    return (
        (a.rows, a.columns) == (b.rows, b.columns)
        and _near(a.orientation, b.orientation, cosine_tolerance)
        and _near(a.pixel_spacing_mm, b.pixel_spacing_mm, SPACING_TOLERANCE_MM)
    )


def _near(a: Sequence[float], b: Sequence[float], tolerance: float) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


def _stack_faults(positions: Sequence[Vector], orientation: Sequence[float]) -> Iterator[Fault]:
    """Distances along the normal (PS3.3 C.7.6.2.1.1) must be equal, and there must be no drift across it."""
    normal = _cross(orientation[:3], orientation[3:])
    heights = sorted(_dot(position, normal) for position in positions)
    gaps = [above - below for below, above in pairwise(heights)]
    step = median(gaps)
    if step <= 0 or min(gaps) < step / 2:
        yield Fault(Reason.IRREGULAR_GEOMETRY, "two images at the same position")
    elif max(gaps) > 1.5 * step:
        yield Fault(Reason.MISSING_SLICES, f"a gap of {max(gaps):.2f} mm where {step:.2f} mm are usual")
    elif any(abs(gap - step) > STEP_TOLERANCE * step for gap in gaps):
        yield Fault(Reason.IRREGULAR_GEOMETRY, "images are not equally spaced")
    foot = [
        tuple(c - _dot(position, normal) * n for c, n in zip(position, normal, strict=True)) for position in positions
    ]
    if not all(_near(foot[0], other, DRIFT_TOLERANCE_MM) for other in foot):
        yield Fault(Reason.IRREGULAR_GEOMETRY, "images do not lie above each other")


def _cross(a: Sequence[float], b: Sequence[float]) -> Vector:
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _concatenation(header: Dataset) -> tuple[str, int, int] | None:
    """PS3.3 C.7.6.16, Multi-frame Functional Groups; the total may be absent, and is then at least the number."""
    uid = "".join(texts(header, "ConcatenationUID")[:1])
    part, total = number(header, "InConcatenationNumber"), number(header, "InConcatenationTotalNumber")
    return (uid, int(part or 0), int(total or 0)) if uid else None


def _vectors(header: Dataset, keyword: str, length: int) -> Iterator[tuple[float, ...]]:
    for value in values(header, keyword):
        try:
            vector = tuple(float(component) for component in value)
        except (TypeError, ValueError):
            continue
        if len(vector) == length:
            yield vector
