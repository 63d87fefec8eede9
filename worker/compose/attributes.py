"""Which attribute a derived image takes from where: one table, applied and printed.

Hides the module tables of classic MR Image Storage (PS3.3 A.4) and the rules for derived images (C.7.6.1.1.2). An image
is built from this table alone, so that what it does not name cannot leak from a source; `render_table` prints it for
the conformance statement. Must never let the simulated dose stand where the injected dose belongs (C.7.6.4).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag
from pydicom.uid import MRImageStorage
from pydicom.valuerep import VR, format_number_as_ds

from service.core.dicom.header import PRODUCT_NAME

INSTANCE_CREATOR_UID = "2.25.129812984864173981408840055848352892878"


class Action(Enum):
    """Where the value of an attribute comes from."""

    COPY = "COPY"  # verbatim from the slice that the signal was added to
    COPY_LOW = "COPY (low dose)"  # verbatim from the low-dose series: what was really injected
    SET = "SET"  # a constant
    DERIVE = "DERIVE"  # computed for this image
    REMOVE = "REMOVE"  # deliberately absent


@dataclass(frozen=True)
class Row:
    """One attribute of a derived image."""

    keyword: str
    action: Action
    why: str
    reference: str  # part of PS3.3
    value: Any = None  # of SET; of COPY, what is written where the source has nothing ("" for type 2, None for nothing)


def _copy(keywords: str, why: str, reference: str, *, otherwise: str | None = None) -> list[Row]:
    return [Row(keyword, Action.COPY, why, reference, otherwise) for keyword in keywords.split()]


def _copy_low(keywords: str, why: str, reference: str) -> list[Row]:
    return [Row(keyword, Action.COPY_LOW, why, reference) for keyword in keywords.split()]


def _derive(keywords: str, why: str, reference: str) -> list[Row]:
    return [Row(keyword, Action.DERIVE, why, reference) for keyword in keywords.split()]


def _remove(keywords: str, why: str, reference: str) -> list[Row]:
    return [Row(keyword, Action.REMOVE, why, reference) for keyword in keywords.split()]


# Whom and which study an object is about: the same for every kind of result.
PATIENT_AND_STUDY: tuple[Row, ...] = (
    *_derive("SpecificCharacterSet", "that of the source; ISO_IR 192 where the two series differ", "C.12.1"),
    *_copy("TimezoneOffsetFromUTC", "our own times are written in the same zone", "C.12.1"),
    *_copy("PatientName PatientID PatientBirthDate PatientSex", "same patient", "C.7.1.1", otherwise=""),
    *_copy("IssuerOfPatientID IssuerOfPatientIDQualifiersSequence PatientIdentityRemoved DeidentificationMethod"
           " DeidentificationMethodCodeSequence QualityControlSubject", "same patient", "C.7.1.1"),
    *_copy("PatientAge PatientSize PatientWeight", "same patient at the time of the study", "C.7.2.2"),
    *_copy("ClinicalTrialSponsorName ClinicalTrialProtocolID ClinicalTrialProtocolName ClinicalTrialSiteID"
           " ClinicalTrialSiteName ClinicalTrialSubjectID ClinicalTrialSubjectReadingID", "same trial", "C.7.1.3"),
    *_copy("StudyInstanceUID", "the derived series belongs to the study", "C.7.2.1"),
    *_copy("StudyID StudyDate StudyTime AccessionNumber ReferringPhysicianName", "same study", "C.7.2.1", otherwise=""),
    *_copy("StudyDescription IssuerOfAccessionNumberSequence ProcedureCodeSequence", "same study", "C.7.2.1"),
)  # fmt: skip

# Who made it, when, and what it is: the same for every kind of result.
MAKER: tuple[Row, ...] = (
    Row("SyntheticData", Action.SET, "part of the content was made artificially", "C.12.1", "YES"),
    Row("ContentQualification", Action.SET, "not an approved product", "C.8.13.2.1.1", "RESEARCH"),
    Row("InstanceCreatorUID", Action.SET, "this product", "C.12.1", INSTANCE_CREATOR_UID),
    Row("Manufacturer", Action.SET, "who made this object; the scanner is contributing equipment", "C.7.5.1",
        PRODUCT_NAME),
    Row("ManufacturerModelName", Action.SET, "who made this object", "C.7.5.1", PRODUCT_NAME),
    *_derive("SoftwareVersions", "service version, model and the start of the model's SHA-256", "C.7.5.1"),
    *_derive("SOPInstanceUID SeriesInstanceUID", "the same input, model and configuration give the same UIDs",
             "C.12.1, C.7.3.1"),
    *_derive("SeriesNumber", "not that of a series that was read, above 9000; another for each kind and engine",
             "C.7.3.1"),
    *_derive("SeriesDescription", "says that nothing here was acquired", "C.7.3.1"),
    *_derive("InstanceCreationDate InstanceCreationTime SeriesDate SeriesTime ContentDate ContentTime",
             "when the object was made", "C.12.1, C.7.3.1, C.7.6.1"),
    *_derive("ContributingEquipmentSequence", "the scanner, and this product", "C.12.1.1.5"),
    *_derive("PrivateDataElementCharacteristicsSequence", "the private block identifies nobody", "C.12.1"),
)  # fmt: skip

# Every other object than the images: these rows, and the content that deploy/conformance.md describes.
OBJECT_TABLE = PATIENT_AND_STUDY + MAKER

TABLE: tuple[Row, ...] = (
    *PATIENT_AND_STUDY,
    *_copy("FrameOfReferenceUID", "no voxel has moved", "C.7.4.1"),
    *_copy("PositionReferenceIndicator", "no voxel has moved", "C.7.4.1", otherwise=""),
    *_copy("PatientPosition", "no voxel has moved", "C.7.3.1", otherwise=""),
    *_copy("BodyPartExamined", "stands in for Laterality; BRAIN where the source has none", "C.7.3.1",
           otherwise="BRAIN"),
    *_copy("ImagePositionPatient ImageOrientationPatient PixelSpacing", "the same digits: no voxel has moved",
           "C.7.6.2"),
    *_copy("SliceThickness", "same slice", "C.7.6.2", otherwise=""),
    *_copy("SpacingBetweenSlices SliceLocation", "same slice", "C.7.6.2, C.8.3.1"),
    *_copy("Rows Columns", "same matrix", "C.7.6.3"),
    *_copy("QualityControlImage", "a phantom stays a phantom", "C.7.6.1"),
    *_copy("ScanningSequence SequenceVariant", "how the source was acquired", "C.8.3.1"),
    *_copy("ScanOptions MRAcquisitionType RepetitionTime EchoTime EchoTrainLength", "how the source was acquired",
           "C.8.3.1", otherwise=""),
    *_copy("InversionTime FlipAngle MagneticFieldStrength ImagingFrequency ImagedNucleus NumberOfAverages",
           "how the source was acquired", "C.8.3.1"),
    *_copy("AcquisitionDate AcquisitionTime AcquisitionDateTime", "when the source was acquired", "C.7.6.1"),
    *_copy("AcquisitionNumber", "when the source was acquired", "C.7.6.1", otherwise=""),
    *_derive("ContrastBolusAgent", "the agent really injected, as the low-dose series writes it", "C.7.6.4"),
    *_derive("ContrastBolusAgentSequence", "the codes of the agent really injected", "C.7.6.4"),
    *_copy_low("ContrastBolusRoute ContrastBolusVolume ContrastBolusStartTime ContrastBolusStopTime"
               " ContrastBolusTotalDose ContrastFlowRate ContrastFlowDuration ContrastBolusIngredient"
               " ContrastBolusIngredientConcentration",
               "what was really injected: the simulated dose never stands here", "C.7.6.4"),
    Row("SOPClassUID", Action.SET, "classic MR, also for Enhanced input", "C.12.1", MRImageStorage),
    *_derive("ImageType", "derived, not by the scanner, and by which engine", "C.7.6.1.1.2, C.8.3.1.1.1"),
    *MAKER,
    Row("Modality", Action.SET, "", "C.7.3.1", "MR"),
    *_derive("InstanceNumber", "1..N by slice position", "C.7.6.1"),
    *_derive("DerivationDescription DerivationCodeSequence", "how the image was made", "C.7.6.1"),
    *_derive("SourceImageSequence", "the slice the signal was added to, and its partner", "C.7.6.1"),
    *_derive("ReferencedSeriesSequence", "the series of those two slices", "C.12.2"),
    Row("BurnedInAnnotation", Action.SET, "no identifying text is burned in", "C.7.6.1", "NO"),
    Row("RecognizableVisualFeatures", Action.SET, "a head", "C.7.6.1", "YES"),
    *_derive("LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod",
             "once lossy, always lossy", "C.7.6.1.1.5"),
    Row("PresentationLUTShape", Action.SET, "", "C.11.6", "IDENTITY"),
    Row("SamplesPerPixel", Action.SET, "", "C.7.6.3", 1),
    Row("PhotometricInterpretation", Action.SET, "", "C.7.6.3", "MONOCHROME2"),
    Row("BitsAllocated", Action.SET, "", "C.7.6.3", 16),
    Row("BitsStored", Action.SET, "room for the sum", "C.7.6.3", 16),
    Row("HighBit", Action.SET, "", "C.7.6.3", 15),
    *_derive("PixelRepresentation", "that of the source", "C.7.6.3"),
    *_derive("PixelData", "stored values of the source plus the signal, and the watermark outside the head", "C.7.6.3"),
    *_derive("SmallestImagePixelValue LargestImagePixelValue", "of this slice", "C.7.6.3"),
    *_derive("WindowCenter WindowWidth", "one window for the series", "C.11.2"),
    *_remove("RescaleSlope RescaleIntercept RescaleType RealWorldValueMappingSequence", "not in this IOD", "A.4"),
    *_remove("PixelPaddingValue PixelPaddingRangeLimit SmallestPixelValueInSeries LargestPixelValueInSeries"
             " IconImageSequence", "describes the source's pixels", "C.7.6.3"),
    *_remove("ProtocolName SequenceName", "hanging protocols must not take the image for an acquired one", "C.7.3.1"),
    *_remove("Laterality", "an unpaired organ", "C.7.3.1"),
    *_remove("OperatorsName PerformingPhysicianName InstitutionName StationName DeviceSerialNumber",
             "people and equipment of the acquisition; the scanner is contributing equipment", "C.7.3.1, C.7.5.1"),
    *_remove("PerformedProcedureStepID PerformedProcedureStepStartDate PerformedProcedureStepStartTime"
             " ReferencedPerformedProcedureStepSequence RequestAttributesSequence",
             "another procedure step; AccessionNumber keeps the order", "C.7.3.1"),
    *_remove("SAR dBdt B1rms TriggerTime TemporalPositionIdentifier NumberOfTemporalPositions",
             "properties of the acquisition", "C.8.3.1"),
    *_remove("DigitalSignaturesSequence MACParametersSequence EncryptedAttributesSequence OriginalAttributesSequence",
             "about another data set", "C.12.1"),
    *_remove("ReferencedImageSequence ImageComments PatientComments", "not needed", "C.7.6.1, C.7.1.1"),
)  # fmt: skip


def render_table(table: tuple[Row, ...] = TABLE) -> str:
    """A table as Markdown, for the conformance statement."""
    lines = ["| Attribute | Tag | Value from | Why | PS3.3 |", "|---|---|---|---|---|"]
    for row in table:
        tag = _tag(row.keyword)
        constant = row.value if isinstance(row.value, list) else [row.value]
        said = f" `{chr(92).join(map(str, constant))}`" if row.action is Action.SET else ""
        name = f"({tag.group:04X},{tag.element:04X})"
        lines.append(f"| {row.keyword} | {name} | {row.action.value}{said} | {row.why} | {row.reference} |")
    return "\n".join(lines) + "\n"


def fill_table(
    header: Dataset,
    low_header: Dataset,
    values: Mapping[str, Any],
    table: tuple[Row, ...] = TABLE,
    instance: Dataset | None = None,
) -> Dataset:
    """A data set with what the table says.

    Args:
        header: of the slice that the signal was added to.
        low_header: of the low-dose series.
        values: by keyword, for every DERIVE row; None leaves the attribute out.
        table: the rows.
        instance: filled in place; without it the result holds nothing but what the table says.
    """
    instance = Dataset() if instance is None else instance
    for row in table:
        if row.action in (Action.COPY, Action.COPY_LOW):
            instance.pop(row.keyword, None)
            _copy_element(instance, header if row.action is Action.COPY else low_header, row)
        elif row.action is Action.SET:
            setattr(instance, row.keyword, row.value)
        elif row.action is Action.DERIVE and values[row.keyword] is not None:
            _set(instance, row.keyword, values[row.keyword])
    return instance


def _copy_element(instance: Dataset, header: Dataset, row: Row) -> None:
    element = header.get(_tag(row.keyword))
    value = None if element is None or element.is_empty else _copied(element)
    if value is not None and element is not None:
        instance[row.keyword] = DataElement(element.tag, element.VR, value)
    elif row.value is not None:
        setattr(instance, row.keyword, row.value)


def _copied(element: DataElement) -> Any:
    """The value as the source writes it; None where it is text that is no number but should be one."""
    if element.VR == VR.SQ:
        return without_private(element.value)
    if element.VR not in (VR.DS, VR.IS):
        return element.value
    values = element.value if isinstance(element.value, MultiValue | list) else [element.value]
    written = [str(value).strip().replace(",", ".") for value in values]
    form = _INTEGER if element.VR == VR.IS else _DECIMAL
    return [_short(text) for text in written] if all(map(form.fullmatch, written)) else None


_INTEGER = re.compile(r"[+-]?\d{1,12}")
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _short(text: str) -> str:
    """A decimal string, shortened only when it is longer than the 16 bytes of a DS."""
    return text if len(text) <= 16 else format_number_as_ds(float(text))


def without_private(sequence: Sequence) -> Sequence:
    """A copy of a sequence without private elements."""
    kept = copy.deepcopy(sequence)
    for item in kept:
        item.remove_private_tags()
    return kept


def _set(instance: Dataset, keyword: str, value: Any) -> None:
    """Set an element; pixel values take the VR that PixelRepresentation asks for."""
    representation = {"US or SS": VR.SS if instance.get("PixelRepresentation") else VR.US, "OB or OW": VR.OW}
    vr = dictionary_VR(keyword)
    instance[keyword] = DataElement(_tag(keyword), representation.get(vr, vr), value)


def _tag(keyword: str) -> BaseTag:
    return Tag(keyword)
