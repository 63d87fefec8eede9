"""Derived classic MR instances: a source series plus a contrast signal.

Hides how the values are found that `worker.attributes` says are derived: pixels in the stored units of the source, UIDs
that follow from the input, references (PS3.3 C.7.6.1, C.12.2), contributing equipment (C.12.1.1.5). Must never change a
stored value to which nothing was added, or give two results of different input the same UID.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any

import highdicom
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.codedict import codes
from pydicom.uid import UID, ExplicitVRLittleEndian

from models.volume import Array
from service.core.errors import Permanent, Reason
from service.core.header import PRIVATE_CREATOR, PRIVATE_GROUP, PRODUCT_NAME, items, number, numbers, texts
from worker.attributes import fill_table, without_private
from worker.planes import Plane
from worker.study import Series, axes

_ROOT = uuid.UUID("5e0c8f0e-6b7a-4d0f-9a55-2f0f7d1f6c11")
_IMPLEMENTATION_UID = f"2.25.{uuid.uuid5(_ROOT, 'implementation').int}"


class Kind(Enum):
    """Which image the signal is added to. The value names the folder of the series."""

    SD = "sd"  # to the pre-contrast image: what the standard dose would have shown
    SD_PLUS = "sd_plus"  # to the low-dose image


_DESCRIPTIONS = {
    Kind.SD: "AI SYNTH T1+C SD - NOT ACQUIRED",
    Kind.SD_PLUS: "AI SYNTH T1+C SD+ - NOT ACQUIRED",
}


@dataclass(frozen=True)
class DerivationContext:
    """What made the signal, and when."""

    model_id: str
    model_sha256: str
    config_hash: str  # of everything beside model and input that decides the result
    agent: str | None  # generic name
    administered_dose_mmol_per_kg: float | None
    simulated_dose_mmol_per_kg: float | None
    software_version: str
    now: datetime
    series_numbers_in_use: frozenset[int] = frozenset()


def derive(kind: Kind, source: Series, signal: Array, other: Series, context: DerivationContext) -> Iterator[Dataset]:
    """The derived series, slice by slice in ascending order, ready to be saved.

    Args:
        kind: SD (source is the pre-contrast series) or SD_PLUS (source is the low-dose series).
        source: the series whose voxels the signal is added to; gives geometry, patient and study.
        signal: (k, j, i) on the grid of `source.volume()`, in its unit.
        other: the partner of the pair.
        context: what made the signal.

    Raises:
        ValueError: the signal has another shape than the source.
        Permanent: OUTPUT_INVALID when the signal is not finite.
    """
    if signal.shape != (len(source.planes), *source.planes[0].stored.shape):
        raise ValueError(f"signal {signal.shape} is not on the grid of the source")
    if not np.isfinite(signal).all():
        raise Permanent(Reason.OUTPUT_INVALID, "the signal is not finite")
    pixels = _sum(source, signal)
    # The watermark that is burned in outside the head belongs here, before minimum, maximum and window are taken.
    low = other if kind is Kind.SD else source
    shared = _of_series(kind, source, other, context) | _of_pixels(pixels)
    shared["DerivationDescription"] = _derivation_description(kind, context, pixels.note)
    partners = _partners(source, other)
    for index, (plane, partner) in enumerate(zip(source.planes, partners, strict=True)):
        values = shared | _of_slice(shared["SeriesInstanceUID"], index, plane, partner, source=source, other=other)
        values |= _of_slice_pixels(pixels.voxels[index])
        instance = fill_table(plane.header, low.header, values)
        _add_private_block(instance, kind, context)
        _add_file_meta(instance, context)
        yield instance


def _of_series(kind: Kind, source: Series, other: Series, context: DerivationContext) -> dict[str, Any]:
    """What all images of the series share."""
    header = source.header
    moment = _local(context.now, header)
    day, clock = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")
    low = other if kind is Kind.SD else source
    return {
        "SpecificCharacterSet": _character_set(header, other.header),
        "SeriesInstanceUID": _series_uid(kind, source, other, context),
        "SeriesNumber": _series_number(kind, source, other, context),
        "SeriesDescription": _DESCRIPTIONS[kind],
        "SoftwareVersions": [context.software_version, context.model_id, context.model_sha256[:16]],
        **{f"{event}Date": day for event in ("InstanceCreation", "Series", "Content")},
        **{f"{event}Time": clock for event in ("InstanceCreation", "Series", "Content")},
        "DerivationCodeSequence": _derivation_codes(),
        "ContributingEquipmentSequence": _equipment(header, context, moment),
        "ContrastBolusAgent": " ".join(texts(low.header, "ContrastBolusAgent"))[:64] or context.agent or "",
        "ContrastBolusAgentSequence": _agent_codes(low.header) or None,
        "PrivateDataElementCharacteristicsSequence": [_private_characteristics()],
        **_lossy([source, other]),
    }


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


def _series_number(kind: Kind, source: Series, other: Series, context: DerivationContext) -> int:
    """The first unused one above 9000: odd for SD, even for SD+."""
    used = {int(number(series.header, "SeriesNumber") or 0) for series in (source, other)}
    used |= context.series_numbers_in_use
    candidate = 9001 if kind is Kind.SD else 9002
    while candidate in used:
        candidate += 2
    return candidate


def _derivation_description(kind: Kind, context: DerivationContext, note: str) -> str:
    def dose(value: float | None) -> str:
        return f"{value:.3g} mmol/kg" if value is not None else "unknown dose"

    base = "pre-contrast image" if kind is Kind.SD else "low-dose image"
    return (
        f"Synthetic standard-dose T1 post-contrast (simulated {dose(context.simulated_dose_mmol_per_kg)}): signal"
        f" predicted by {context.model_id} from pre-contrast and low-dose series (3-D context; administered"
        f" {dose(context.administered_dose_mmol_per_kg)} {context.agent or 'unknown agent'}), added to the {base}."
        f"{note} NOT ACQUIRED. Research use only; trained on simulated data; not a medical device."
    )


def _derivation_codes() -> list[Dataset]:
    """The steps in order; CID 7203 has no code for the synthesis, hence a private one."""
    synthesis = _code("SYNTHCE", "99LOWGAD", "Synthesis of contrast enhancement")
    return [_code("113085", "DCM", "Spatial resampling"), synthesis]


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _agent_codes(low_header: Dataset) -> list[Dataset]:
    """The agent's codes alone; Enhanced MR keeps volumes beside them, which have their own place in classic MR."""
    return [
        _code(item.CodeValue, item.CodingSchemeDesignator, item.get("CodeMeaning", ""))
        for item in items(low_header, "ContrastBolusAgentSequence")
        if "CodeValue" in item and "CodingSchemeDesignator" in item
    ]


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


def _lossy(pair: Sequence[Series]) -> dict[str, Any]:
    keywords = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
    for series in pair:
        for plane in series.planes:
            if texts(plane.header, keywords[0]) == ["01"]:
                return {keyword: texts(plane.header, keyword) or None for keyword in keywords}
    return dict.fromkeys(keywords) | {keywords[0]: "00"}


# ------------------------------------------------------------------------------------------------------- the pixels


@dataclass(frozen=True)
class _Pixels:
    """Stored values (k, j, i) of the derived series."""

    voxels: npt.NDArray[np.integer]
    note: str  # how they differ from plain addition; empty when they do not


def _sum(source: Series, signal: Array) -> _Pixels:
    """Stored values of the source plus the signal in the source's stored units, rounded.

    Where the rounded signal is 0 the stored value is that of the source, bit for bit. Only when slices are scaled
    differently, or the sum does not fit 16 bits, one linear map is applied to the whole series, and `note` says so.
    """
    scales = np.array([(plane.unit_per_stored, plane.unit_offset) for plane in source.planes])
    signed = number(source.header, "PixelRepresentation") == 1
    limits = np.iinfo(np.int16 if signed else np.uint16)
    if np.ptp(scales, axis=0).any():
        unit = float(np.abs(scales[:, 0]).max())
        summed = np.stack([np.rint(plane.in_units() / unit) for plane in source.planes]) + np.rint(signal / unit)
        note = " Slices scaled differently in the source have one common scale here."
    else:
        stored = np.stack([plane.stored for plane in source.planes]).astype(np.int64)
        summed, note = stored + np.rint(signal / scales[0, 0]).astype(np.int64), ""
    largest = np.abs(summed).max() if signed else summed.max()
    if largest > limits.max:
        summed = np.rint(summed * (limits.max / float(largest)))
        note += f" All stored values were multiplied by {limits.max / float(largest):.6g} to fit 16 bits."
    return _Pixels(summed.clip(limits.min, limits.max).astype(limits.dtype), note)


def _of_pixels(pixels: _Pixels) -> dict[str, Any]:
    """What describes the pixels of the whole series."""
    sample = pixels.voxels[::2, ::2, ::2]
    head = sample[sample > 0]
    bottom, top = np.percentile(head, (1, 99.8)) if head.size else (0, 1)
    width = max(round(float(top - bottom)), 1)
    return {
        "PixelRepresentation": int(pixels.voxels.dtype.kind == "i"),
        "WindowCenter": str(round(float(bottom) + width / 2)),
        "WindowWidth": str(width),
    }


def _of_slice_pixels(voxels: npt.NDArray[np.integer]) -> dict[str, Any]:
    return {
        "PixelData": voxels.astype(voxels.dtype.newbyteorder("<")).tobytes(),
        "SmallestImagePixelValue": int(voxels.min()),
        "LargestImagePixelValue": int(voxels.max()),
    }


# ------------------------------------------------------------------------------------------------------- references


def _partners(source: Series, other: Series) -> list[Plane]:
    """For each source plane the plane of the partner that lies nearest along the normal."""
    normal = np.cross(*axes(source.header))

    def heights(series: Series) -> npt.NDArray[np.float64]:
        return np.array([numbers(plane.header, "ImagePositionPatient") for plane in series.planes]) @ normal

    nearest = np.abs(heights(source)[:, None] - heights(other)[None, :]).argmin(axis=1)
    return [other.planes[n] for n in nearest]


def _of_slice(
    series_uid: str, index: int, plane: Plane, partner: Plane, *, source: Series, other: Series
) -> dict[str, Any]:
    """Identity and references of one image."""
    name = f"{series_uid}|{plane.sop_instance_uid}|{plane.frame_number}"
    return {
        "SOPInstanceUID": f"2.25.{uuid.uuid5(_ROOT, name).int}",
        "InstanceNumber": index + 1,
        "SourceImageSequence": [_source(plane, moved=False), _source(partner, moved=True)],
        "ReferencedSeriesSequence": _referenced(source, plane, other, partner),
    }


def _source(plane: Plane, *, moved: bool) -> Dataset:
    item = _reference(plane)
    if plane.frame_number is not None:
        item.ReferencedFrameNumber = plane.frame_number
    purpose = _code("121322", "DCM", "Source image for image processing operation")
    item.PurposeOfReferenceCodeSequence = [purpose]
    item.SpatialLocationsPreserved = "NO" if moved else "YES"
    return item


def _referenced(source: Series, plane: Plane, other: Series, partner: Plane) -> list[Dataset]:
    """The series of both planes, each series and each object once: two volumes may lie in one series, or one object."""
    objects: dict[str, dict[str, Dataset]] = {source.series_uid: {}, other.series_uid: {}}
    for series, one in ((source, plane), (other, partner)):
        objects[series.series_uid][one.sop_instance_uid] = _reference(one)
    referenced = []
    for series_uid, instances in objects.items():
        item = Dataset()
        item.SeriesInstanceUID, item.ReferencedInstanceSequence = series_uid, list(instances.values())
        referenced.append(item)
    return referenced


def _reference(plane: Plane) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = plane.header.SOPClassUID, plane.sop_instance_uid
    return item


def _add_private_block(instance: Dataset, kind: Kind, context: DerivationContext) -> None:
    """Provenance for our own tools; the public attributes say the same, since systems in between may drop this."""
    block = instance.private_block(PRIVATE_GROUP, PRIVATE_CREATOR, create=True)
    block.add_new(0x01, "LO", context.model_id)
    block.add_new(0x02, "LO", context.model_sha256)
    block.add_new(0x03, "LO", context.config_hash)
    block.add_new(0x04, "CS", kind.name)
    if context.simulated_dose_mmol_per_kg is not None:
        block.add_new(0x05, "FD", context.simulated_dose_mmol_per_kg)
    if context.administered_dose_mmol_per_kg is not None:
        block.add_new(0x06, "FD", context.administered_dose_mmol_per_kg)


def _add_file_meta(instance: Dataset, context: DerivationContext) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = instance.SOPClassUID, instance.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(_IMPLEMENTATION_UID)
    meta.ImplementationVersionName = f"{PRODUCT_NAME} {context.software_version}".upper()[:16]
    instance.file_meta = meta
