"""A study: files become series, and series become volumes.

Hides grouping, series that hold several volumes, and the order of slices (PS3.3 C.7.6.2.1.1); what makes one whole
regular volume is decided in `service.core.dicom.series`, as for intake. Must never let through what is not one study of
one patient, or images that lowgad made: those are set aside, and said to be.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from models.volume import Volume
from service.core.dicom.accepted import HEAD_BYTES, SOP_CLASSES, may_be_image
from service.core.dicom.header import is_synthetic
from service.core.dicom.series import STEP_TOLERANCE, Fault, HeaderSummary, count_fault, geometry_faults
from service.core.dicom.site_rules import SiteRule
from service.core.dicom.values import number, numbers, texts
from service.core.errors import Permanent, Reason
from worker.read.facts import Facts, read_facts
from worker.read.planes import Instance, Plane, read_instance


@dataclass(frozen=True, eq=False)
class Series:
    """One volume: planes in ascending order along cross(row, column), so that its affine is right-handed.

    Most DICOM series are one volume; of one that holds several, each is a series of its own here.
    """

    series_uid: str
    planes: tuple[Plane, ...]
    facts: Facts  # what the headers say
    fault: Fault | None = None
    part: str = ""  # which volume of the DICOM series, where that holds several: the attribute that tells them apart

    @property
    def header(self) -> Dataset:
        """The header of the first plane."""
        return self.planes[0].header

    @property
    def unit(self) -> str:
        """What the voxels count: see `Plane.unit`."""
        return self.planes[0].unit

    @property
    def label(self) -> str:
        """How messages name the series: by its number, which identifies nobody, and the part of it."""
        named = f"series {int(number(self.header, 'SeriesNumber') or 0)}"
        return f"{named} ({self.part})" if self.part else named

    def volume(self) -> Volume:
        """Voxels (k, j, i) in the planes' unit, and the affine to LPS mm (PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1).

        Raises:
            Permanent: the series' fault; UNREADABLE_FILE when pixel data cannot be decoded, UNSUPPORTED_OBJECT when
                rescaled values are beyond single precision.
        """
        self.refuse_fault()
        with np.errstate(over="ignore"):
            voxels = np.stack([plane.in_units() for plane in self.planes])
        if not np.isfinite(voxels).all():
            raise Permanent(Reason.UNSUPPORTED_OBJECT, f"{self.label}: rescaled values are beyond single precision")
        return Volume(voxels, _affine([plane.header for plane in self.planes]))

    def refuse_fault(self) -> None:
        """Raise the fault of this series, if it has one, as Permanent."""
        if self.fault:
            raise Permanent(self.fault.reason, f"{self.label}: {self.fault.detail}")


@dataclass(frozen=True)
class Study:
    """The MR series of one study of one patient, by series number, and what else lay beside them."""

    study_uid: str
    series: tuple[Series, ...]
    ignored: tuple[str, ...] = ()
    series_numbers: frozenset[int] = frozenset()  # of everything in the study that we did not make, images or not


def find_files(folder: Path) -> list[Path]:
    """The files under `folder` that may be DICOM instances (`core.dicom.accepted.may_be_image`), sorted by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if may_be_image(path.relative_to(folder), _head(path)))


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def read_study(paths: Iterable[Path], rules: Sequence[SiteRule] = ()) -> Study:
    """Read all files of one study, and what their headers say. Pixels are decoded when a volume is asked for.

    Args:
        paths: the instances, in any order; every one must be readable.
        rules: of the site.

    Raises:
        Permanent: EMPTY_UPLOAD, UNREADABLE_FILE, UNSUPPORTED_OBJECT, TWO_PATIENTS, TWO_STUDIES, NOT_MR, OWN_OUTPUT
            (nothing but synthetic images). A series that is not one whole volume is kept, with its fault, until it
            is needed.
    """
    all_paths = list(paths)
    if not all_paths:
        raise Permanent(Reason.EMPTY_UPLOAD)
    instances = [read_instance(path) for path in all_paths]
    _refuse_mixture(instances)
    instances, own = _set_own_aside(instances)
    images = _without_copies([instance for instance in instances if instance.planes])
    if not images:
        is_mr = any(instance.header.get("SOPClassUID") in SOP_CLASSES for instance in instances)
        raise Permanent(Reason.UNSUPPORTED_OBJECT if is_mr else Reason.NOT_MR, "; ".join(_others(instances)))
    series = sorted(_grouped(images, rules), key=lambda one: (number(one.header, "SeriesNumber") or 0, one.series_uid))
    numbers_in_use = frozenset(int(number(instance.header, "SeriesNumber") or 0) for instance in instances)
    return Study(str(images[0].header.StudyInstanceUID), tuple(series), (*own, *_others(instances)), numbers_in_use)


def _refuse_mixture(instances: Sequence[Instance]) -> None:
    """Refuse two patients or two studies; a patient is told apart by ID, issuer, name and birth date."""
    for keyword in ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate"):
        found = {plain(text) for instance in instances for text in texts(instance.header, keyword)} - {""}
        if len(found) > 1:
            raise Permanent(Reason.TWO_PATIENTS, f"{len(found)} different values of {keyword}")
    studies = {str(instance.header.get("StudyInstanceUID", "")) for instance in instances} - {""}
    if len(studies) > 1:
        raise Permanent(Reason.TWO_STUDIES, f"{len(studies)} different values of StudyInstanceUID")


def plain(text: str) -> str:
    """A patient attribute without what differs between writers: case, blanks, empty name parts, other scripts."""
    return re.sub(r"[\s^]+", " ", text.split("=", maxsplit=1)[0]).strip().casefold()


def _set_own_aside(instances: Sequence[Instance]) -> tuple[list[Instance], list[str]]:
    """What others made, and what is said of the rest: a result is never the input of another."""
    others = [instance for instance in instances if not is_synthetic(instance.header)]
    own = len(instances) - len(others)
    if not others:
        raise Permanent(Reason.OWN_OUTPUT, f"{own} of {own} objects")
    return others, [f"{own} x synthetic image (SyntheticData is YES, or lowgad made it)"] if own else []


def _without_copies(instances: Sequence[Instance]) -> list[Instance]:
    """Every SOP instance once.

    Raises:
        Permanent: IRREGULAR_GEOMETRY when two different objects claim the same SOP Instance UID.
    """
    first: dict[str, Instance] = {}
    for instance in instances:
        known = first.setdefault(str(instance.header.SOPInstanceUID), instance)
        if known is not instance and known.path.read_bytes() != instance.path.read_bytes():
            raise Permanent(Reason.IRREGULAR_GEOMETRY, "two different objects have the same SOP Instance UID")
    return list(first.values())


def _others(instances: Sequence[Instance]) -> list[str]:
    counts = Counter(instance.kind for instance in instances if not instance.planes)
    return [f"{count} x {name}" for name, count in sorted(counts.items())]


def _grouped(instances: Sequence[Instance], rules: Sequence[SiteRule]) -> Iterator[Series]:
    groups: dict[str, list[Plane]] = defaultdict(list)
    for instance in instances:
        groups[str(instance.header.SeriesInstanceUID)] += instance.planes
    for series_uid, planes in groups.items():
        for stack in _volumes(planes):
            yield Series(series_uid, stack.planes, read_facts(stack.planes, rules), stack.fault, stack.part)


@dataclass(frozen=True)
class _Stack:
    """Planes that are one volume, in order, or would be without the fault."""

    planes: tuple[Plane, ...]
    fault: Fault | None
    part: str


# What tells the volumes of one series apart, in the order in which it is tried (PS3.3 C.7.6.16, C.7.6.1, C.8.3.1).
_DIVIDERS = ("StackID", "AcquisitionNumber", "TemporalPositionIdentifier", "ImageType", "EchoTime", "FlipAngle")
_MOST_PARTS = 4  # more volumes than these are a dynamic examination


def _volumes(planes: Sequence[Plane]) -> Sequence[_Stack]:
    """A series as one volume; where it is none, as the few whole volumes that one or two attributes tell apart."""
    members = [(plane, HeaderSummary.of(plane.header)) for plane in planes]
    whole = _stack(members)
    if not whole.fault or count_fault([summary for _, summary in members]):
        return [whole]
    # A gap is no reason to look for two volumes: two halves of one would be found. Stacks are said to be volumes.
    dividers = _DIVIDERS if whole.fault.reason is Reason.IRREGULAR_GEOMETRY else _DIVIDERS[:1]
    varying = [keyword for keyword in dividers if len(_by_values(members, [keyword])) > 1]
    for keywords in itertools.chain(itertools.combinations(varying, 1), itertools.combinations(varying, 2)):
        groups = _by_values(members, keywords)
        if len(groups) <= _MOST_PARTS:
            parts = [_stack(group, _said(keywords, key)) for key, group in sorted(groups.items())]
            if not any(part.fault for part in parts):
                return parts
    return [whole]


_Member = tuple[Plane, HeaderSummary]


def _by_values(members: Sequence[_Member], keywords: Sequence[str]) -> Mapping[tuple[str, ...], list[_Member]]:
    """The planes of a series by the values of these attributes."""
    groups: dict[tuple[str, ...], list[_Member]] = defaultdict(list)
    for plane, summary in members:
        groups[tuple("\\".join(texts(plane.header, keyword)) for keyword in keywords)].append((plane, summary))
    return groups


def _said(keywords: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{keyword} {value}" for keyword, value in zip(keywords, values, strict=True))


def _stack(members: Sequence[_Member], part: str = "") -> _Stack:
    """Sort the planes along their normal, or say what keeps them from being one regular volume."""
    planes, summaries = [plane for plane, _ in members], [summary for _, summary in members]
    if part:  # what counts images or objects may count those of the other volumes too
        summaries = [replace(summary, images_in_acquisition=None, concatenation=None) for summary in summaries]
    fault = next(iter(geometry_faults(summaries)), None) or _impossible(planes)
    if fault:
        return _Stack(tuple(planes), fault, part)
    normal = np.cross(*axes(planes[0].header))
    heights = np.array([numbers(plane.header, "ImagePositionPatient") for plane in planes]) @ normal
    ordered = tuple(planes[n] for n in np.argsort(heights))
    step_mm = float(np.ptp(heights)) / (len(planes) - 1)
    return _Stack(ordered, _impossible_step(planes[0].header, step_mm), part)


_SPACING_RANGE_MM = (0.01, 100.0)


def _impossible(planes: Sequence[Plane]) -> Fault | None:
    if len({plane.unit for plane in planes}) > 1:
        return Fault(Reason.IRREGULAR_GEOMETRY, "slices are scaled in different ways")
    row, column = axes(planes[0].header)
    lengths = np.abs([row @ row - 1, column @ column - 1, row @ column])
    spacing_mm = numbers(planes[0].header, "PixelSpacing")
    if lengths.max() > 1e-2 or not _SPACING_RANGE_MM[0] <= min(spacing_mm) <= max(spacing_mm) <= _SPACING_RANGE_MM[1]:
        return Fault(Reason.IRREGULAR_GEOMETRY, "ImageOrientationPatient or PixelSpacing is impossible")
    if min(plane.unit_per_stored for plane in planes) <= 0:
        return Fault(Reason.UNSUPPORTED_OBJECT, "a rescale slope is not positive")
    return None


def _impossible_step(header: Dataset, step_mm: float) -> Fault | None:
    """Slices hardly apart; or a multiple of their stated distance apart, with more than half a slice between them.

    Of the latter both signs are wanted, because some scanners write the gap alone as SpacingBetweenSlices.
    """
    if not _SPACING_RANGE_MM[0] <= step_mm <= _SPACING_RANGE_MM[1]:
        return Fault(Reason.IRREGULAR_GEOMETRY, f"slices are {step_mm:.3g} mm apart")
    stated, thickness = number(header, "SpacingBetweenSlices"), number(header, "SliceThickness")
    if not stated or not thickness or stated <= 0:
        return None
    ratio = step_mm / stated
    if round(ratio) >= 2 and abs(ratio - round(ratio)) < STEP_TOLERANCE and step_mm > 1.5 * thickness:
        return Fault(Reason.MISSING_SLICES, f"only every {round(ratio)}. slice is present")
    return None


def axes(header: Dataset) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Direction cosines of a row (increasing column index) and of a column (increasing row index)."""
    cosines = np.array(numbers(header, "ImageOrientationPatient"))
    return cosines[:3], cosines[3:]


def _affine(headers: Sequence[Dataset]) -> npt.NDArray[np.float64]:
    """The 4x4 matrix from (i, j, k, 1) = (column, row, slice) to LPS mm."""
    row, column = axes(headers[0])
    between_rows, between_columns = numbers(headers[0], "PixelSpacing")
    first, last = (np.array(numbers(headers[n], "ImagePositionPatient")) for n in (0, -1))
    affine = np.eye(4)
    affine[:3, 0] = row * between_columns
    affine[:3, 1] = column * between_rows
    affine[:3, 2] = (last - first) / (len(headers) - 1)
    affine[:3, 3] = first
    return affine
