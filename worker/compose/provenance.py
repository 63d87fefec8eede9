"""What every result says about its making: identity, origin, references, marks.

Hides how UIDs follow from the input, which SeriesNumber belongs to which kind and engine, contributing equipment (PS3.3
C.12.1.1.5), references to the sources (C.7.6.1, C.12.2) and our private block. Must never give two results of different
input the same UID, or leave a result without the marks by which lowgad knows its own output again.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import highdicom
import numpy as np
import numpy.typing as npt
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import UID, ExplicitVRLittleEndian

from service.core.dicom.header import PRIVATE_CREATOR, PRIVATE_GROUP, PRODUCT_NAME
from service.core.dicom.values import items, number, numbers, texts
from service.core.job import Kind
from worker.compose.attributes import without_private
from worker.compose.context import DerivationContext
from worker.read.planes import Plane
from worker.read.study import Series, axes

CODING_SCHEME = "99LOWGAD"
ENHANCEMENT = Code("PREDCE", CODING_SCHEME, "Predicted contrast enhancement")
_ROOT = uuid.UUID("5e0c8f0e-6b7a-4d0f-9a55-2f0f7d1f6c11")
_IMPLEMENTATION_UID = f"2.25.{uuid.uuid5(_ROOT, 'implementation').int}"
_KINDS = tuple(Kind)
_NUMBERS_PER_ENGINE, _NUMBERS_PER_ROUND = 10, 20
_WHAT = {
    Kind.SD: "T1+C SD",
    Kind.SD_PLUS: "T1+C SD+",
    Kind.SUBTRACTION: "T1 enhancement",
    Kind.PARAMETRIC_MAP: "enhancement map",
    Kind.SEGMENTATION: "enhancement segment",
    Kind.STRUCTURED_REPORT: "report",
    Kind.PRESENTATION_STATE: "annotation",
}


def identify(kind: Kind, source: Series, other: Series, context: DerivationContext) -> dict[str, Any]:
    """Values by keyword that all instances of one series share, whatever they hold.

    Args:
        kind: what the series holds.
        source: whose patient, study and scanner the result takes over.
        other: its partner in the pair.
        context: what made the result, and when.
    """
    header = source.header
    moment = _local(context.now, header)
    day, clock = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")
    return {
        "SpecificCharacterSet": _character_set(header, other.header),
        "SeriesInstanceUID": _series_uid(kind, source, other, context),
        "SeriesNumber": _series_number(kind, (source, other), context),
        "SeriesDescription": f"{context.mark} {_WHAT[kind]} - NOT ACQUIRED",
        "SoftwareVersions": [context.software_version, context.model_id, context.model_sha256[:16]],
        **{f"{event}Date": day for event in ("InstanceCreation", "Series", "Content")},
        **{f"{event}Time": clock for event in ("InstanceCreation", "Series", "Content")},
        "ContributingEquipmentSequence": _equipment(header, context, moment),
        "PrivateDataElementCharacteristicsSequence": [_private_characteristics()],
    }


def name_instance(series_uid: str, plane: Plane | None = None, number: int = 1) -> str:
    """The SOPInstanceUID of the image made from `plane`, or of the object with this number in its series."""
    name = f"{series_uid}|{plane.sop_instance_uid}|{plane.frame_number}" if plane else f"{series_uid}|object {number}"
    return f"2.25.{uuid.uuid5(_ROOT, name).int}"


def name_part(instance_uid: str, part: str) -> str:
    """A UID for something inside an instance (a dimension, a tracked finding), which follows from the instance."""
    return f"2.25.{uuid.uuid5(_ROOT, f'{instance_uid}|{part}').int}"


def derivation(kind: Kind, context: DerivationContext, note: str = "") -> dict[str, Any]:
    """DerivationDescription and DerivationCodeSequence.

    The codes are the steps in order; CID 7203 has none for the synthesis, hence a private one.
    """

    def dose(value: float | None) -> str:
        return f"{value:.3g} mmol/kg" if value is not None else "unknown dose"

    base = {
        Kind.SD: "added to the pre-contrast image",
        Kind.SD_PLUS: "added to the low-dose image beside its own enhancement",
    }.get(kind, "alone, on the grid of the pre-contrast image")
    text = (
        f"Synthetic T1 post-contrast: signal of {dose(context.simulated_dose_mmol_per_kg)}"
        f" predicted by {context.model_id} from pre-contrast and low-dose series (3-D context; administered"
        f" {dose(context.administered_dose_mmol_per_kg)} {context.agent or 'unknown agent'}), {base}."
        f"{note} NOT ACQUIRED. {context.notice[:1].upper()}{context.notice[1:]}."
    )
    synthesis = code("SYNTHCE", CODING_SCHEME, "Synthesis of contrast enhancement")
    return {
        "DerivationDescription": text[:1024],
        "DerivationCodeSequence": [code("113085", "DCM", "Spatial resampling"), synthesis],
    }


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """An item of a code sequence (PS3.3 section 8.8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def add_marks(instance: Dataset, kind: Kind, context: DerivationContext, pixels_sha256: str | None = None) -> None:
    """Add the private block and the file meta information.

    The block is provenance for our own tools; the public attributes say the same, since systems in between may drop it.
    `pixels_sha256` is of the stored values before the watermark.
    """
    block = instance.private_block(PRIVATE_GROUP, PRIVATE_CREATOR, create=True)
    block.add_new(0x01, "LO", context.model_id)
    block.add_new(0x02, "LO", context.model_sha256)
    block.add_new(0x03, "LO", context.config_hash)
    block.add_new(0x04, "LO", kind.name)
    if context.simulated_dose_mmol_per_kg is not None:
        block.add_new(0x05, "FD", context.simulated_dose_mmol_per_kg)
    if context.administered_dose_mmol_per_kg is not None:
        block.add_new(0x06, "FD", context.administered_dose_mmol_per_kg)
    if pixels_sha256 is not None:
        block.add_new(0x07, "LO", pixels_sha256)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = instance.SOPClassUID, instance.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(_IMPLEMENTATION_UID)
    meta.ImplementationVersionName = f"{PRODUCT_NAME} {context.software_version}".upper()[:16]
    instance.file_meta = meta


def _character_set(header: Dataset, other: Dataset) -> list[str] | str | None:
    """That of the source, so that its text stays as it is; one for all where the two series differ."""
    own, partner = header.get("SpecificCharacterSet"), other.get("SpecificCharacterSet")
    return own if own == partner else "ISO_IR 192"


def _local(moment: datetime, header: Dataset) -> datetime:
    """The moment in the time zone that the source names (TimezoneOffsetFromUTC), or else that of the machine."""
    offset = re.fullmatch(r"([+-])(\d\d)(\d\d)", "".join(texts(header, "TimezoneOffsetFromUTC")))
    if not offset or moment.tzinfo is None:
        return moment.astimezone()
    delta = timedelta(hours=int(offset[2]), minutes=int(offset[3]))
    return moment.astimezone(timezone(-delta if offset[1] == "-" else delta))


def _series_uid(kind: Kind, source: Series, other: Series, context: DerivationContext) -> str:
    """The same for the same source instances, model, configuration and kind; another for any other."""
    parts = [kind.value, context.model_sha256, context.model_id, context.config_hash]
    for series in (source, other):
        parts += [
            series.series_uid,
            *sorted(f"{plane.sop_instance_uid}#{plane.frame_number}" for plane in series.planes),
        ]
    return f"2.25.{uuid.uuid5(_ROOT, hashlib.sha256('|'.join(parts).encode()).hexdigest()).int}"


def _series_number(kind: Kind, pair: Sequence[Series], context: DerivationContext) -> int:
    """9001 to 9007 by kind for a network, 9011 to 9017 for the linear engine; 20 higher as long as it is in use."""
    used = {int(number(series.header, "SeriesNumber") or 0) for series in pair} | context.series_numbers_in_use
    candidate = 9001 + _KINDS.index(kind) + (0 if context.is_learned else _NUMBERS_PER_ENGINE)
    while candidate in used:
        candidate += _NUMBERS_PER_ROUND
    return candidate


def _equipment(header: Dataset, context: DerivationContext, moment: datetime) -> list[Dataset]:
    """The scanner and this product (C.12.1.1.5), after whatever the source already lists."""

    def cut(keyword: str, length: int) -> str | None:
        return " ".join(texts(header, keyword))[:length] or None

    scanner = highdicom.ContributingEquipment(
        manufacturer=cut("Manufacturer", 64) or "unknown",
        purpose_of_reference=codes.DCM.AcquisitionEquipment,
        manufacturer_model_name=cut("ManufacturerModelName", 64),
        software_versions=[text[:64] for text in texts(header, "SoftwareVersions")] or None,
        device_serial_number=cut("DeviceSerialNumber", 64),
        institution_name=cut("InstitutionName", 64),
        station_name=cut("StationName", 16),
    )
    for element in scanner:
        written = header.get(element.keyword)
        if isinstance(written, bytes):  # text that is not in the stated character set
            scanner[element.tag] = DataElement(element.tag, element.VR, written)
    ours = highdicom.ContributingEquipment(
        manufacturer=PRODUCT_NAME,
        purpose_of_reference=codes.DCM.SynthesizingEquipment,
        manufacturer_model_name=PRODUCT_NAME,
        software_versions=[context.software_version, context.model_id, context.model_sha256[:16]],
        contribution_datetime=moment.strftime("%Y%m%d%H%M%S"),
        contribution_description=f"Synthesis of contrast enhancement by {context.model_id}",
    )
    earlier = without_private(DicomSequence(items(header, "ContributingEquipmentSequence")))
    return [*earlier, scanner, ours]


def _private_characteristics() -> Dataset:
    item = Dataset()
    item.PrivateGroupReference, item.PrivateCreatorReference = PRIVATE_GROUP, PRIVATE_CREATOR
    item.BlockIdentifyingInformationStatus = "SAFE"
    return item


def partners(source: Series, other: Series) -> list[Plane]:
    """For each source plane the plane of the partner that lies nearest along the normal."""
    normal = np.cross(*axes(source.header))

    def heights(series: Series) -> npt.NDArray[np.float64]:
        return np.array([numbers(plane.header, "ImagePositionPatient") for plane in series.planes]) @ normal

    nearest = np.abs(heights(source)[:, None] - heights(other)[None, :]).argmin(axis=1)
    return [other.planes[n] for n in nearest]


def source_image(plane: Plane, *, moved: bool) -> Dataset:
    """An item of SourceImageSequence (C.7.6.1.1.4); `moved` when the image was resampled."""
    item = reference(plane)
    if plane.frame_number is not None:
        item.ReferencedFrameNumber = plane.frame_number
    purpose = code("121322", "DCM", "Source image for image processing operation")
    item.PurposeOfReferenceCodeSequence = [purpose]
    item.SpatialLocationsPreserved = "NO" if moved else "YES"
    return item


def referenced_series(planes: Iterable[tuple[Series, Plane]]) -> list[Dataset]:
    """ReferencedSeriesSequence (C.12.2) of these planes.

    Each series and each object stands there once: two volumes may lie in one series, or in one object.
    """
    objects: dict[str, dict[str, Dataset]] = defaultdict(dict)
    for series, plane in planes:
        objects[series.series_uid][plane.sop_instance_uid] = reference(plane)
    referenced = []
    for series_uid, instances in objects.items():
        item = Dataset()
        item.SeriesInstanceUID, item.ReferencedInstanceSequence = series_uid, list(instances.values())
        referenced.append(item)
    return referenced


def reference(plane: Plane) -> Dataset:
    """SOP class and instance of the object that holds the plane."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = plane.header.SOPClassUID, plane.sop_instance_uid
    return item
