"""One DICOM file of MR images as planes: a flat header, the stored pixels on demand, and their unit.

Hides the three ways in which MR images are written, classic MR (PS3.3 A.4), Enhanced and Legacy Converted Enhanced MR
(PS3.3 A.36, A.70: functional groups, C.7.6.16, C.8.13), and the vendors' scalings of stored values. A plane of a
multi-frame object looks like a classic slice: the attributes of its frame lie flat in `header`, under the keywords of
classic MR, as the original strings.

Must never decode pixels before their size is bounded, inflate a deflated data set, or put a header value into an error.
"""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import JPEG2000, UID, DeflatedExplicitVRLittleEndian, JPEGLSNearLossless, MRImageStorage
from pydicom.valuerep import VR, PersonName, format_number_as_ds

from service.core.dicom.accepted import DAMAGE, SOP_CLASSES, TRANSFER_SYNTAXES
from service.core.dicom.header import administered_agents
from service.core.dicom.values import acquisition_date_and_time, items, number, texts
from service.core.errors import Permanent, Reason

_MAX_SIDE = 2048
_MAX_FRAMES = 4096
_MAX_BYTES = 2**30

_PIXEL_DATA = Tag("PixelData")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Transfer syntaxes that may be lossy, and the method (PS3.3 C.7.6.1.1.5): lossy where the header is silent.
_LOSSY = {JPEGLSNearLossless: "ISO_14495_1", JPEG2000: "ISO_15444_1"}

Stored = npt.NDArray[np.integer]


@dataclass(frozen=True)
class _Pixels:
    """The pixels of one file, decoded when first asked for and then kept."""

    path: Path
    shape: tuple[int, int, int]  # frames, rows, columns
    bits_stored: int

    @cached_property
    def frames(self) -> Stored:
        """Stored values (frame, row, column); bits above BitsStored are cleared, or hold the sign.

        Raises:
            Permanent: UNREADABLE_FILE when the decoder fails or gives another size than the header says.
        """
        try:
            array = pixel_array(self.path).reshape(self.shape)
        except DAMAGE as error:
            raise Permanent(Reason.UNREADABLE_FILE, f"pixel data cannot be decoded ({type(error).__name__})") from error
        unused = array.dtype.itemsize * 8 - self.bits_stored
        return (array << unused) >> unused if unused else array


@dataclass(frozen=True)
class Plane:
    """One slice: header without pixels, and unit = stored * unit_per_stored + unit_offset."""

    header: Dataset
    sop_instance_uid: str
    frame_number: int | None  # 1-based in a multi-frame object, None in classic MR
    unit_per_stored: float
    unit_offset: float
    unit: str  # "stored", "rescaled" or "Philips FP": only like units can be compared
    pixels: _Pixels

    @property
    def stored(self) -> Stored:
        """Stored values (row, column), integers.

        Raises:
            Permanent: UNREADABLE_FILE when the pixel data cannot be decoded.
        """
        frame: Stored = self.pixels.frames[(self.frame_number or 1) - 1]
        return frame

    def in_units(self) -> npt.NDArray[np.float32]:
        """The slice (row, column) in its unit."""
        return (self.stored * self.unit_per_stored + self.unit_offset).astype(np.float32)


@dataclass(frozen=True)
class Instance:
    """One file: whom it belongs to, and its planes when it holds MR images that we can decode."""

    path: Path
    header: Dataset
    kind: str  # name of the SOP class, and why it has no planes where it might have
    planes: tuple[Plane, ...] = ()


def read_instance(path: Path) -> Instance:
    """Read one DICOM file without decoding its pixels.

    Raises:
        Permanent: UNREADABLE_FILE (not DICOM, damaged, required UIDs or pixel data missing), UNSUPPORTED_OBJECT
            (transfer syntax or size of MR images), INPUT_LOST (the file is gone).
    """
    try:
        dataset = _parse(path)
        name = UID(dataset.get("SOPClassUID") or dataset.file_meta.MediaStorageSOPClassUID).name
        if dataset.get("SOPClassUID") not in SOP_CLASSES:
            return Instance(path, dataset, name)
        pixels = _bounded_pixels(dataset, path)
        del dataset.PixelData
        unsupported = _unsupported(dataset, pixels)
        if unsupported:
            return Instance(path, dataset, f"{name} {unsupported}")
        return Instance(path, dataset, name, tuple(_planes(dataset, pixels)))
    except FileNotFoundError as error:
        raise Permanent(Reason.INPUT_LOST, "a file of the study is gone") from error
    except DAMAGE as error:
        raise Permanent(Reason.UNREADABLE_FILE, f"a file cannot be parsed ({type(error).__name__})") from error


def _parse(path: Path) -> FileDataset:
    """The whole data set of a Part 10 file; of anything but an MR image only what precedes the pixels."""
    meta = read_file_meta_info(path)
    wanted = meta.get("MediaStorageSOPClassUID", MRImageStorage) in SOP_CLASSES
    syntax = UID(meta.TransferSyntaxUID)
    if syntax == DeflatedExplicitVRLittleEndian or (wanted and syntax not in TRANSFER_SYNTAXES):
        # A few deflated kilobytes can become gigabytes: refused before a byte is inflated.
        raise Permanent(Reason.UNSUPPORTED_OBJECT, f"transfer syntax {syntax.name}")
    dataset = dcmread(path, stop_before_pixels=not wanted)
    _convert(dataset)
    if syntax in _LOSSY and not texts(dataset, "LossyImageCompression"):
        dataset.LossyImageCompression, dataset.LossyImageCompressionMethod = "01", _LOSSY[syntax]
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID") if wanted else ():
        if not dataset.get(keyword):
            raise Permanent(Reason.UNREADABLE_FILE, f"{keyword} is missing")
    return dataset


def _convert(dataset: Dataset) -> None:
    """Make pydicom convert every public element now, so that damage shows here and not where a value is used.

    Private elements are left alone: vendors write some that break rules, and that is no reason to refuse an image.
    """
    for tag in [tag for tag in dataset.keys() if not tag.is_private and tag != _PIXEL_DATA]:  # noqa: SIM118 a Dataset iterates over elements
        written = dataset.get_item(tag)
        element = dataset[tag]
        if element.VR in _TEXT and isinstance(written, RawDataElement) and _REPLACEMENT in str(element.value):
            _keep_bytes(dataset, element, written.value or b"")
        for item in element.value if element.VR == VR.SQ else ():
            _convert(item)


_TEXT = {VR.LO, VR.LT, VR.PN, VR.SH, VR.ST, VR.UC, VR.UT}  # in the Specific Character Set (PS3.5 section 6.1.2.3)


def _keep_bytes(dataset: Dataset, element: DataElement, written: bytes) -> None:
    """Keep text that is not in the stated character set as it is written: another name would be another patient."""
    value: bytes | PersonName = written.rstrip(b" ")
    if element.VR == VR.PN:
        first = element.value[0] if element.VM > 1 else element.value
        value = PersonName(value, first.encodings)
    dataset[element.tag] = DataElement(element.tag, element.VR, value, already_converted=True)


def _bounded_pixels(dataset: Dataset, path: Path) -> _Pixels:
    """The pixels of an MR image, refused here when they are too many or too few."""
    frames = int(number(dataset, "NumberOfFrames") or 1)
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    size = frames * rows * columns * dataset.SamplesPerPixel * dataset.BitsAllocated // 8
    if not (0 < rows <= _MAX_SIDE and 0 < columns <= _MAX_SIDE and 0 < frames <= _MAX_FRAMES and size <= _MAX_BYTES):
        raise Permanent(Reason.UNSUPPORTED_OBJECT, f"{frames} frames of {rows} x {columns} pixels")
    present = len(dataset.get_item("PixelData").value)
    if not dataset.file_meta.TransferSyntaxUID.is_compressed and present < size:
        raise Permanent(Reason.UNREADABLE_FILE, f"pixel data has {present} of {size} bytes")
    return _Pixels(path, (frames, rows, columns), int(dataset.BitsStored))


def _unsupported(dataset: Dataset, pixels: _Pixels) -> str:
    """Why the images of an MR object are of no use here, colour maps for one; empty when they are not."""
    stored = (dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.HighBit + 1)
    if stored != (1, "MONOCHROME2", dataset.BitsStored) or dataset.BitsAllocated not in (8, 16):
        return "in colour or of an unusual pixel format"
    if dataset.SOPClassUID == MRImageStorage and pixels.shape[0] != 1:
        return "with several frames"
    return ""


def _planes(dataset: Dataset, pixels: _Pixels) -> Iterator[Plane]:
    uid = str(dataset.SOPInstanceUID)
    if dataset.SOPClassUID == MRImageStorage:
        yield Plane(dataset, uid, None, *_scaling(dataset, [dataset]), pixels)
        return
    top = [element for element in dataset if not element.is_private and element.keyword not in _FUNCTIONAL_GROUPS]
    shared = items(dataset, "SharedFunctionalGroupsSequence")
    frames = items(dataset, "PerFrameFunctionalGroupsSequence")
    if len(frames) != pixels.shape[0]:
        raise Permanent(Reason.UNREADABLE_FILE, f"{len(frames)} functional groups for {pixels.shape[0]} frames")
    for index, frame in enumerate(frames):
        header = _flat_header(top, [*shared, frame])
        yield Plane(header, uid, index + 1, *_scaling(header, _philips_items(frame, shared)), pixels)


_FUNCTIONAL_GROUPS = frozenset({"SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"})


def _flat_header(top: Iterable[DataElement], groups: Iterable[Dataset]) -> Dataset:
    """The attributes of one frame under the keywords of classic MR; the frame outranks the object.

    The elements are copies: what a frame is given under a classic keyword is not said of the other frames, too.
    """
    header = Dataset()
    for element in top:
        header[element.tag] = copy.copy(element)
    for group in groups:
        for macro in group:
            if macro.VR == VR.SQ and not macro.is_private:
                header[macro.tag] = macro
                converted = macro.keyword.startswith("Unassigned")  # of the slices that a legacy object was made from
                for element in macro.value[0] if macro.value else ():
                    if not element.is_private and not (converted and element.tag in header):
                        header[element.tag] = copy.copy(element)
    _name_as_classic(header)
    return header


_SAME_TEXT = (
    ("ImageType", "FrameType"),
    ("ImagedNucleus", "ResonantNucleus"),
    ("AcquisitionNumber", "FrameAcquisitionNumber"),
    ("AcquisitionDateTime", "FrameAcquisitionDateTime"),
    ("TemporalPositionIdentifier", "TemporalPositionIndex"),
)


def _name_as_classic(header: Dataset) -> None:
    """Add the classic keyword beside each Enhanced MR attribute that says the same (PS3.3 C.8.13 and C.8.3.1)."""
    for classic, enhanced in (("EchoTime", "EffectiveEchoTime"), ("ImagingFrequency", "TransmitterFrequency")):
        _set_ds(header, classic, number(header, enhanced))
    _set_ds(header, "InversionTime", number(header, "InversionTimes"))
    for classic, enhanced in _SAME_TEXT:
        if texts(header, enhanced):
            setattr(header, classic, texts(header, enhanced))
    if texts(header, "EchoPulseSequence") and not texts(header, "ScanningSequence"):
        header.ScanningSequence, header.SequenceVariant = _scanning_sequence(header)
    date, clock = acquisition_date_and_time(header)
    if len(clock) >= 6:
        header.AcquisitionDate, header.AcquisitionTime = date, clock
    _name_contrast_as_classic(header)


def _scanning_sequence(header: Dataset) -> tuple[list[str], list[str]]:
    """ScanningSequence and SequenceVariant from the MR Pulse Sequence and MR Modifier attributes."""

    def says(keyword: str, *values: str) -> bool:
        return bool(set(texts(header, keyword)) & set(values))

    inverted = says("InversionRecovery", "YES")
    scanning = {
        "SE": says("EchoPulseSequence", "SPIN", "BOTH"),
        "GR": says("EchoPulseSequence", "GRADIENT", "BOTH"),
        "IR": inverted,
        "EP": says("EchoPlanarPulseSequence", "YES"),
    }
    variant = {
        "SP": says("Spoiling", "RF", "GRADIENT", "RF_AND_GRADIENT"),
        "MP": inverted and scanning["GR"],
        "SS": bool(texts(header, "SteadyStatePulseSequence")) and not says("SteadyStatePulseSequence", "NONE"),
    }
    return [name for name, is_so in scanning.items() if is_so], [name for name, is_so in variant.items() if is_so] or [
        "NONE"
    ]


def _name_contrast_as_classic(header: Dataset) -> None:
    """Contrast/Bolus attributes of classic MR from the items of Enhanced MR, where they are not stated as such.

    The volume is that of all agents that were in the patient by then (PS3.3 C.7.6.4b); it stays unknown unless every
    item states its own.
    """
    agents = administered_agents(header)
    if not agents:
        return
    if not texts(header, "ContrastBolusAgent"):
        header.ContrastBolusAgent = " + ".join(text for agent in agents for text in texts(agent, "CodeMeaning"))[:64]
    volumes = [_volume_ml(agent) for agent in agents]
    known = [volume for volume in volumes if volume is not None]
    if len(known) == len(agents) and number(header, "ContrastBolusVolume") is None:
        _set_ds(header, "ContrastBolusVolume", sum(known))
    strengths = {number(agent, "ContrastBolusIngredientConcentration") for agent in agents}
    if len(strengths) == 1:
        _set_ds(header, "ContrastBolusIngredientConcentration", strengths.pop())
    starts = [clock for agent in agents for clock in _profile_texts(agent, "ContrastBolusStartTime")]
    if starts and not texts(header, "ContrastBolusStartTime"):
        header.ContrastBolusStartTime = min(starts)


def _volume_ml(agent: Dataset) -> float | None:
    """ContrastBolusVolume of an agent, or the sum over its phases of administration; None where they disagree."""
    stated = number(agent, "ContrastBolusVolume")
    phases = items(agent, "ContrastAdministrationProfileSequence")
    given = [value for phase in phases if (value := number(phase, "ContrastBolusVolume")) is not None]
    if not given or len(given) < len(phases):
        return stated
    return sum(given) if not stated or math.isclose(stated, sum(given), rel_tol=0.02) else None


def _profile_texts(agent: Dataset, keyword: str) -> list[str]:
    return [text for phase in items(agent, "ContrastAdministrationProfileSequence") for text in texts(phase, keyword)]


def _set_ds(header: Dataset, keyword: str, value: float | None) -> None:
    if value is not None:
        setattr(header, keyword, format_number_as_ds(value))


def _scaling(header: Dataset, private: Iterable[Dataset]) -> tuple[float, float, str]:
    """(unit_per_stored, unit_offset, unit) of a plane.

    Philips writes stored values SV that only its private scale slope SS makes comparable between series:
    FP = (SV * RS + RI) / (RS * SS) with RescaleSlope RS and RescaleIntercept RI. RS and RI alone are for display.
    Where a slope is zero, unit_per_stored is.
    """
    slope = number(header, "RescaleSlope")
    slope = 1.0 if slope is None else slope
    intercept = number(header, "RescaleIntercept") or 0.0
    scale_slopes = [value for item in private if (value := _philips_scale_slope(item)) is not None]
    if not scale_slopes:
        return slope, intercept, "rescaled"
    scale = slope * scale_slopes[0]
    return (slope / scale, intercept / scale, "Philips FP") if scale else (0.0, 0.0, "Philips FP")


_PHILIPS_SCALING = (0x2005, "Philips MR Imaging DD 001", 0x0E)
_PHILIPS_FRAME = (0x2005, "Philips MR Imaging DD 005", 0x0F)


def _philips_items(frame: Dataset, shared: Iterable[Dataset]) -> list[Dataset]:
    """Where the scale slope of a frame may stand, the frame's own first.

    In the private item of a frame that repeats the classic header, of which only the scale slope is to be trusted; in a
    Legacy Converted object among the attributes of the slices that have no other place.
    """
    value = _private(frame, *_PHILIPS_FRAME)
    found = list(value) if isinstance(value, Sequence) else []
    found += items(frame, "UnassignedPerFrameConvertedAttributesSequence")
    return found + [item for group in shared for item in items(group, "UnassignedSharedConvertedAttributesSequence")]


def _philips_scale_slope(item: Dataset) -> float | None:
    value = _private(item, *_PHILIPS_SCALING)
    if isinstance(value, bytes) and len(value) == 4:  # kept as UN by a system in between
        value = struct.unpack("<f", value)[0]
    return float(value) if isinstance(value, float) and math.isfinite(value) else None


def _private(dataset: Dataset, group: int, creator: str, offset: int) -> object:
    try:
        return dataset.private_block(group, creator)[offset].value
    except KeyError:
        return None
