"""All kinds of result of one job: the MR series and, made with highdicom, what stands beside them.

Hides parametric map (PS3.3 A.75), segmentation (A.51), presentation state (A.33.1) and report (A.35.3): which grid they
lie on, what they refer to, and that they carry the same patient, study, origin and marks as the images. Must never make
an object from a signal that the MR series do not show, and never leave a UID to chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import highdicom
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import (
    UID,
    ComprehensiveSRStorage,
    GrayscaleSoftcopyPresentationStateStorage,
    MRImageStorage,
    ParametricMapStorage,
    SegmentationStorage,
)

from models.preprocess import Prepared
from models.volume import Array
from service.core.dicom.header import PRODUCT_NAME
from service.core.dicom.values import numbers, texts
from service.core.job import Kind
from worker.choose.pairing import Pair
from worker.compose.attributes import OBJECT_TABLE, fill_table
from worker.compose.context import DerivationContext, Outputs
from worker.compose.derived import MR_SERIES, derive, lossy
from worker.compose.provenance import (
    ENHANCEMENT,
    add_marks,
    derivation,
    identify,
    name_instance,
    name_part,
    partners,
    referenced_series,
    source_image,
)
from worker.compose.structured_report import make_content
from worker.read.study import Series

WORDS = "SYNTHETIC - NOT ACQUIRED"
LAYER = "SYNTHETIC"
STORED_AS = {
    Kind.SD: MRImageStorage,
    Kind.SD_PLUS: MRImageStorage,
    Kind.SUBTRACTION: MRImageStorage,
    Kind.PARAMETRIC_MAP: ParametricMapStorage,
    Kind.SEGMENTATION: SegmentationStorage,
    Kind.STRUCTURED_REPORT: ComprehensiveSRStorage,
    Kind.PRESENTATION_STATE: GrayscaleSoftcopyPresentationStateStorage,
}  # the SOP class of each kind


@dataclass(frozen=True)
class Findings:
    """What a job knows when it composes its results."""

    pair: Pair
    prepared: Prepared
    signal: Array  # (k, j, i) on the working grid, white matter = 1
    report: Mapping[str, Any]  # see worker.compose.report.report_findings
    context: DerivationContext


def compose(findings: Findings, outputs: Outputs) -> dict[str, list[Dataset]]:
    """Every kind of result that is wanted, by the name of its folder."""
    pair, prepared, context = findings.pair, findings.prepared, findings.context
    on_pre = prepared.signal_on_pre(findings.signal)
    made: dict[Kind, list[Dataset]] = {}
    for kind in (kind for kind in MR_SERIES if kind in outputs.kinds):
        source, other, signal = pair.pre, pair.low, on_pre
        if kind is Kind.SD_PLUS:
            source, other, signal = pair.low, pair.pre, prepared.signal_on_low(findings.signal)
        made[kind] = list(derive(kind, source, signal, other, context, watermarked=outputs.watermark))
    relative = (on_pre / np.float32(prepared.scale)).astype(np.float32)
    if Kind.PARAMETRIC_MAP in outputs.kinds:
        made[Kind.PARAMETRIC_MAP] = [make_map(pair, relative, context)]
    if Kind.SEGMENTATION in outputs.kinds:
        made[Kind.SEGMENTATION] = [make_segmentation(pair, relative, outputs.threshold, context)]
    if Kind.PRESENTATION_STATE in outputs.kinds:
        made[Kind.PRESENTATION_STATE] = list(make_presentation_states(pair, made, context))
    if Kind.STRUCTURED_REPORT in outputs.kinds:
        voxel_ml = float(np.prod(prepared.native_pre.spacing_mm)) / 1000
        enhancing_ml = float((relative > outputs.threshold).sum()) * voxel_ml
        made[Kind.STRUCTURED_REPORT] = [make_report(findings, enhancing_ml, outputs.threshold)]
    return {kind.value: made[kind] for kind in Kind if kind in made}


def make_map(pair: Pair, signal: Array, context: DerivationContext) -> Dataset:
    """The predicted signal as a parametric map of 32-bit floating-point numbers.

    Args:
        pair: the two series.
        signal: (k, j, i) on the grid of the pre-contrast series, white matter = 1.
        context: what made the signal, and when.
    """
    values = _identity(Kind.PARAMETRIC_MAP, pair, context)
    top = max(float(signal.max()), 0.01)
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label="ENHANCEMENT",
        lut_explanation="Predicted contrast enhancement, white matter = 1",
        unit=codes.UCUM.NoUnits,
        value_range=(0.0, top),
        slope=1.0,
        intercept=0.0,
        quantity_definition=ENHANCEMENT,
    )
    made = highdicom.pm.ParametricMap(
        _stand_ins(pair.pre),
        signal,
        **_constructor(values, context),
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[
            highdicom.VOILUTTransformation(window_center=top / 2, window_width=top, voi_lut_function="LINEAR_EXACT")
        ],
        content_label="ENHANCEMENT",
        content_description="Predicted contrast enhancement, not acquired",
    )
    made.Modality = "MR"  # that acquired the data (C.7.3.1); highdicom says OT
    for keyword, value in derivation(Kind.PARAMETRIC_MAP, context).items():
        setattr(made, keyword, value)
    return _finished(made, Kind.PARAMETRIC_MAP, pair, values, context)


def make_segmentation(pair: Pair, signal: Array, threshold: float, context: DerivationContext) -> Dataset:
    """Where the predicted signal exceeds the threshold (white matter = 1): enhancing tissue and vessels, not lesions.

    A frame without such a voxel is left out, unless there is none in any.
    """
    values = _identity(Kind.SEGMENTATION, pair, context)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=context.model_id,
        # CID 7162; what is not learned is a filter that adapts to the noise.
        family=codes.DCM.ArtificialIntelligence if context.is_learned else codes.DCM.AdaptiveFiltering,
        version=context.model_version,
        source=PRODUCT_NAME,
        parameters={"threshold": f"{threshold:g}", "sha256": context.model_sha256},
    )
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label=f"Predicted enhancement > {threshold:g}",
        segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
        segmented_property_type=ENHANCEMENT,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=name_part(values["SOPInstanceUID"], "segment 1"),
        tracking_id="Predicted enhancement",
        anatomic_regions=[codes.SCT.Brain],
    )
    segment.SegmentDescription = (
        f"Voxels whose predicted contrast enhancement exceeds {threshold:g} of white matter: vessels, meninges and"
        " mucosa as well as lesions"
    )
    made = highdicom.seg.Segmentation(
        _stand_ins(pair.pre),
        (signal > threshold).astype(np.uint8),
        highdicom.seg.SegmentationTypeValues.BINARY,
        [segment],
        **_constructor(values, context),
        content_label="ENHANCEMENT",
        content_description="Predicted contrast enhancement, not acquired",
    )
    return _finished(made, Kind.SEGMENTATION, pair, values, context)


def make_presentation_states(
    pair: Pair, made: dict[Kind, list[Dataset]], context: DerivationContext
) -> Iterator[Dataset]:
    """For each MR series a state that shows its window, and over every image that it is synthetic."""
    for number, kind in enumerate((kind for kind in MR_SERIES if kind in made), start=1):
        images = [_stand_in(image, str(image.SOPInstanceUID), str(image.SeriesInstanceUID)) for image in made[kind]]
        shown = made[kind][0]
        values = _identity(Kind.PRESENTATION_STATE, pair, context, number)
        layer = highdicom.pr.GraphicLayer(LAYER, order=1, description="What every viewer has to show")
        text = highdicom.pr.TextObject(
            f"{WORDS}\r\n{context.notice}",
            units=highdicom.pr.AnnotationUnitsValues.DISPLAY,
            bounding_box=(0.02, 0.02, 0.98, 0.1),
            text_justification=highdicom.pr.TextJustificationValues.LEFT,
        )
        state = highdicom.pr.GrayscaleSoftcopyPresentationState(
            images,
            **_constructor(values, context),
            content_label=f"SYNTHETIC_{number}",
            content_description=f"Synthetic annotation of {shown.SeriesDescription}"[:64],
            graphic_layers=[layer],
            graphic_annotations=[highdicom.pr.GraphicAnnotation(images, layer, text_objects=[text])],
            voi_lut_transformations=[
                highdicom.pr.SoftcopyVOILUTTransformation(
                    window_center=float(shown.WindowCenter), window_width=float(shown.WindowWidth)
                )
            ],
        )
        _show_true_shape(state, shown)
        yield _finished(state, Kind.PRESENTATION_STATE, pair, values, context)


def _show_true_shape(state: Dataset, shown: Dataset) -> None:
    """The displayed areas take the pixels' spacing (C.10.4); highdicom says of all that they are square."""
    for area in state.DisplayedAreaSelectionSequence:
        del area.PresentationPixelAspectRatio
        area.PresentationPixelSpacing = shown.PixelSpacing


def make_report(findings: Findings, enhancing_ml: float, threshold: float) -> Dataset:
    """The structured report about the job, with both source series as evidence."""
    pair, context = findings.pair, findings.context
    values = _identity(Kind.STRUCTURED_REPORT, pair, context)
    content = make_content(
        findings.report, context, values["SOPInstanceUID"], enhancing_ml=enhancing_ml, threshold=threshold
    )
    evidence = _stand_ins(pair.pre)[:1]
    made = highdicom.sr.ComprehensiveSR(
        evidence,
        content[0],
        **_constructor(values, context),
        is_complete=True,
    )
    made.PertinentOtherEvidenceSequence = [_evidence(pair)]
    made.pop("CurrentRequestedProcedureEvidenceSequence", None)
    return _finished(made, Kind.STRUCTURED_REPORT, pair, values, context)


def _evidence(pair: Pair) -> Dataset:
    """All images that the result was computed from (C.17.2.3)."""
    item = Dataset()
    item.StudyInstanceUID = pair.pre.header.StudyInstanceUID
    item.ReferencedSeriesSequence = []
    for series in referenced_series((one, plane) for one in (pair.pre, pair.low) for plane in one.planes):
        series.ReferencedSOPSequence = series.ReferencedInstanceSequence
        del series.ReferencedInstanceSequence
        item.ReferencedSeriesSequence.append(series)
    return item


# ------------------------------------------------------------------------------------------------- what they share


def _identity(kind: Kind, pair: Pair, context: DerivationContext, number: int = 1) -> dict[str, Any]:
    values = identify(kind, pair.pre, pair.low, context)
    values["SOPInstanceUID"] = name_instance(values["SeriesInstanceUID"], number=number)
    values["InstanceNumber"] = number
    return values


def _constructor(values: dict[str, Any], context: DerivationContext) -> dict[str, Any]:
    """What every constructor of highdicom asks for."""
    return {
        "series_instance_uid": values["SeriesInstanceUID"],
        "series_number": values["SeriesNumber"],
        "sop_instance_uid": values["SOPInstanceUID"],
        "instance_number": values["InstanceNumber"],
        "manufacturer": PRODUCT_NAME,
        "manufacturer_model_name": PRODUCT_NAME,
        "software_versions": tuple(values["SoftwareVersions"]),
        "device_serial_number": context.software_version,  # software has none, and the attribute must not be empty
    }


def _stand_ins(series: Series) -> list[Dataset]:
    """Classic single-frame headers with the geometry of the planes, also of a multi-frame object.

    highdicom takes geometry from them. What it says of patient, study and references is replaced by `_finished`.
    """
    first, last = (np.array(numbers(series.planes[n].header, "ImagePositionPatient")) for n in (0, -1))
    distance_mm = float(np.linalg.norm(last - first)) / (len(series.planes) - 1)
    stand_ins = []
    for number, plane in enumerate(series.planes, start=1):
        header = _stand_in(plane.header, f"1.{number}", "1.1")
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            header[keyword] = plane.header[keyword]
        header.SliceThickness = (numbers(plane.header, "SliceThickness") or [distance_mm])[0]
        header.FrameOfReferenceUID = _frame_of_reference(series)
        stand_ins.append(header)
    return stand_ins


def _stand_in(image: Dataset, sop_instance_uid: str, series_uid: str) -> Dataset:
    """A classic single-frame header without a patient: names that highdicom would refuse never reach it."""
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID, header.SeriesInstanceUID = MRImageStorage, sop_instance_uid, series_uid
    header.StudyInstanceUID, header.Modality = "1.1", "MR"
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "ReferringPhysicianName"):
        setattr(header, keyword, "")
    for keyword in ("StudyID", "StudyDate", "StudyTime", "AccessionNumber"):
        setattr(header, keyword, "")
    header.Rows, header.Columns = image.Rows, image.Columns
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    return header


def _frame_of_reference(series: Series) -> str:
    """That of the series; where it names none, one of its own, since these objects must have one."""
    return next(iter(texts(series.header, "FrameOfReferenceUID")), "") or name_part(series.series_uid, "frame")


def _finished(made: Dataset, kind: Kind, pair: Pair, values: dict[str, Any], context: DerivationContext) -> Dataset:
    """The object with the patient, study, origin, references and marks that all results have."""
    fill_table(pair.pre.header, pair.low.header, values, OBJECT_TABLE, made)
    if kind is Kind.PRESENTATION_STATE:  # its IOD has dates of its own
        made.PresentationCreationDate, made.PresentationCreationTime = made.ContentDate, made.ContentTime
        del made.ContentDate, made.ContentTime
    if kind is not Kind.STRUCTURED_REPORT:  # stands in for Laterality, which a report does not have
        made.BodyPartExamined = next(iter(texts(pair.pre.header, "BodyPartExamined")), "BRAIN")
    if "PerFrameFunctionalGroupsSequence" in made:
        _refer_to_sources(made, kind, pair, context)
        _name_dimensions(made)
        for keyword, value in lossy([pair.pre, pair.low]).items():
            if value is not None:
                setattr(made, keyword, value)
    add_marks(made, kind, context)
    return made


def _refer_to_sources(made: Dataset, kind: Kind, pair: Pair, context: DerivationContext) -> None:
    """Each frame names its slice and the partner (C.7.6.16.2.6), and the object both series (C.12.2)."""
    positions = np.array([numbers(plane.header, "ImagePositionPatient") for plane in pair.pre.planes])
    others = partners(pair.pre, pair.low)
    steps = derivation(kind, context)["DerivationCodeSequence"]
    used = []
    for frame in made.PerFrameFunctionalGroupsSequence:
        position = [float(value) for value in frame.PlanePositionSequence[0].ImagePositionPatient]
        nearest = int(np.linalg.norm(positions - position, axis=1).argmin())
        plane, partner = pair.pre.planes[nearest], others[nearest]
        item = Dataset()
        item.DerivationCodeSequence = steps
        item.SourceImageSequence = [source_image(plane, moved=False), source_image(partner, moved=True)]
        frame.DerivationImageSequence = [item]
        used += [(pair.pre, plane), (pair.low, partner)]
    made.ReferencedSeriesSequence = referenced_series(used)
    for keyword in ("SourceImageSequence", "ReferencedImageSequence"):
        made.pop(keyword, None)


def _name_dimensions(made: Dataset) -> None:
    """Highdicom draws the UID of the dimensions; ours follows from the object."""
    uid = UID(name_part(str(made.SOPInstanceUID), "dimensions"))
    for keyword in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        for item in made.get(keyword, ()):
            item.DimensionOrganizationUID = uid
