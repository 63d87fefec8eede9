"""Multi-frame forms of a series: Enhanced MR, its stacks and concatenations, and Legacy Converted Enhanced MR.

Hides which functional groups (PS3.3 C.7.6.16) hold what a classic header says in one place.
"""

from __future__ import annotations

import copy
from io import BytesIO

import numpy as np
from highdicom.legacy import LegacyConvertedEnhancedMRImage
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedMRImageStorage

from tests.factories.studies import apply, code, encode, uid


def as_enhanced(datasets: list[Dataset]) -> Dataset:
    """The same series as one Enhanced MR object; the last slice comes first, as frames have no natural order."""
    first, frames = datasets[0], datasets[::-1]
    multi = copy.deepcopy(first)
    contrast = "ContrastBolusAgent" in first
    for keyword in (*_FRAME_KEYWORDS, *_CLASSIC_CONTRAST):
        if keyword in multi:
            delattr(multi, keyword)
    multi.SOPClassUID, multi.SOPInstanceUID = EnhancedMRImageStorage, uid(first.SOPInstanceUID, "enhanced")
    multi.ImageType = ["ORIGINAL", "PRIMARY", "T1", "NONE"]
    multi.NumberOfFrames = str(len(frames))
    multi.PixelData = b"".join(frame.PixelData for frame in frames)
    multi.EchoPulseSequence = "SPIN" if first.ScanningSequence == "SE" else "GRADIENT"
    multi.AcquisitionDateTime = first.AcquisitionDate + first.AcquisitionTime
    if contrast:
        multi.ContrastBolusAgentSequence = [_enhanced_agent(first)]
    multi.SharedFunctionalGroupsSequence = [_shared_groups(first, contrast=contrast)]
    multi.PerFrameFunctionalGroupsSequence = [_frame_groups(frame, n + 1) for n, frame in enumerate(frames)]
    return multi


def as_stacks(one: Dataset, other: Dataset) -> Dataset:
    """Two Enhanced MR objects as one: the frames of `other` follow as stack 2, under the header of `one`."""
    multi, more = copy.deepcopy(one), copy.deepcopy(other.PerFrameFunctionalGroupsSequence)
    for frame in more:
        frame.FrameContentSequence[0].StackID = "2"
    multi.PerFrameFunctionalGroupsSequence = [*multi.PerFrameFunctionalGroupsSequence, *more]
    multi.NumberOfFrames = str(len(multi.PerFrameFunctionalGroupsSequence))
    multi.PixelData += other.PixelData
    return multi


def as_concatenation(multi: Dataset, parts: int) -> list[Dataset]:
    """An Enhanced MR object as several that follow each other (PS3.3 C.7.6.16, Concatenation UID)."""
    frames, size = multi.PerFrameFunctionalGroupsSequence, len(multi.PixelData) // int(multi.NumberOfFrames)
    objects = []
    for number, chosen in enumerate(np.array_split(np.arange(len(frames)), parts), start=1):
        part = copy.deepcopy(multi)
        part.SOPInstanceUID, part.ConcatenationUID = uid(multi.SOPInstanceUID, number), uid(multi.SOPInstanceUID)
        part.SOPInstanceUIDOfConcatenationSource = multi.SOPInstanceUID
        part.InConcatenationNumber, part.InConcatenationTotalNumber = number, parts
        part.ConcatenationFrameOffsetNumber = int(chosen[0])
        part.NumberOfFrames = str(len(chosen))
        part.PerFrameFunctionalGroupsSequence = [frames[n] for n in chosen]
        part.PixelData = multi.PixelData[size * chosen[0] : size * (chosen[-1] + 1)]
        objects.append(part)
    return objects


def as_legacy_converted(datasets: list[Dataset]) -> Dataset:
    """The same series as one Legacy Converted Enhanced MR object, converted by highdicom."""
    slices = [dcmread(BytesIO(encode(dataset))) for dataset in datasets]
    series, number = slices[0].SeriesInstanceUID, slices[0].SeriesNumber
    return LegacyConvertedEnhancedMRImage(slices, uid(series, "legacy"), number, uid(series, "legacy", "object"), 1)


_FRAME_KEYWORDS = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("SliceLocation", "RepetitionTime", "EchoTime", "InversionTime", "FlipAngle", "EchoTrainLength", "ScanOptions"),
    *("ScanningSequence", "SequenceVariant", "SequenceName", "AcquisitionDate", "AcquisitionTime", "InstanceNumber"),
    *("NumberOfAverages", "ImagedNucleus", "ImagingFrequency", "WindowCenter", "WindowWidth"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "AcquisitionNumber", "TemporalPositionIdentifier"),
)
_CLASSIC_CONTRAST = (
    *("ContrastBolusAgent", "ContrastBolusRoute", "ContrastBolusVolume", "ContrastBolusTotalDose"),
    *("ContrastBolusStartTime", "ContrastBolusIngredientConcentration"),
)


def _enhanced_agent(dataset: Dataset) -> Dataset:
    coded = dataset.get("ContrastBolusAgentSequence")
    agent = copy.deepcopy(coded[0]) if coded else code("407976008", "SCT", "Gadobutrol")
    agent.ContrastBolusAgentNumber = 1
    agent.ContrastBolusVolume = dataset.get("ContrastBolusVolume")
    agent.ContrastBolusIngredientConcentration = dataset.get("ContrastBolusIngredientConcentration")
    agent.ContrastBolusAdministrationRouteSequence = [code("47625008", "SCT", "Intravenous route")]
    return agent


def _taken(source: Dataset, *keywords: str) -> Dataset:
    item = Dataset()
    apply(item, {keyword: source[keyword].value for keyword in keywords if keyword in source})
    return item


def _shared_groups(first: Dataset, *, contrast: bool) -> Dataset:
    shared = Dataset()
    shared.PixelMeasuresSequence = [_taken(first, "PixelSpacing", "SliceThickness", "SpacingBetweenSlices")]
    shared.PlaneOrientationSequence = [_taken(first, "ImageOrientationPatient")]
    shared.MRTimingAndRelatedParametersSequence = [_taken(first, "RepetitionTime", "FlipAngle", "EchoTrainLength")]
    modifier, usage, echo = Dataset(), Dataset(), Dataset()
    modifier.InversionRecovery = "YES" if "InversionTime" in first else "NO"
    if "InversionTime" in first:
        modifier.InversionTimes = [float(first.InversionTime)]
    modifier.Spoiling = "RF" if "SP" in first.SequenceVariant else "NONE"
    echo.EffectiveEchoTime = float(first.EchoTime)
    shared.MRModifierSequence, shared.MREchoSequence = [modifier], [echo]
    if contrast:
        usage.ContrastBolusAgentNumber, usage.ContrastBolusAgentAdministered = 1, "YES"
        shared.ContrastBolusUsageSequence = [usage]
    return shared


def _frame_groups(dataset: Dataset, number: int) -> Dataset:
    frame = Dataset()
    frame.PlanePositionSequence = [_taken(dataset, "ImagePositionPatient")]
    frame.PixelValueTransformationSequence = [_taken(dataset, "RescaleSlope", "RescaleIntercept", "RescaleType")]
    content = Dataset()
    content.InStackPositionNumber, content.StackID = number, "1"
    content.FrameAcquisitionDateTime = dataset.AcquisitionDate + dataset.AcquisitionTime
    content.FrameAcquisitionNumber = int(dataset.AcquisitionNumber)
    if "TemporalPositionIdentifier" in dataset:
        content.TemporalPositionIndex = int(dataset.TemporalPositionIdentifier)
    frame.FrameContentSequence = [content]
    kind = Dataset()
    kind.FrameType = dataset.ImageType
    frame.MRImageFrameTypeSequence = [kind]
    if (0x2005, 0x100E) in dataset:  # where Philips keeps its scale slope in Enhanced MR
        inner = Dataset()
        inner.private_block(0x2005, "Philips MR Imaging DD 001", create=True).add_new(
            0x0E, "FL", dataset[0x2005, 0x100E].value
        )
        frame.private_block(0x2005, "Philips MR Imaging DD 005", create=True).add_new(0x0F, "SQ", [inner])
    return frame
