"""The structured report: how a result came about, as a Measurement Report (PS3.16 TID 1500).

Hides the content tree and its codes. It says what `report.json` says, and nothing that is not in there: acquisition
values with their source, quality figures with their verdict, the model with its digests, why these series were chosen.
Must never give a number for a value that is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import highdicom
from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    RelationshipTypeValues,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from service.core.dicom.header import PRODUCT_NAME
from worker.choose.acquisition import in_words
from worker.compose.attributes import INSTANCE_CREATOR_UID
from worker.compose.context import DerivationContext
from worker.compose.provenance import CODING_SCHEME, ENHANCEMENT, name_part

_MR = Code("113091000", "SCT", "Magnetic resonance imaging")
_SOURCE = Code("SOURCE", CODING_SCHEME, "Where the value comes from")
_VERDICT = Code("VERDICT", CODING_SCHEME, "Verdict")
_LIMIT = Code("LIMIT", CODING_SCHEME, "What the figure means, and its limit")
_NAMES: dict[str, Code] = {
    "weight_kg": Code("27113001", "SCT", "Body weight"),
    "field_strength_t": codes.DCM.MagneticFieldStrength,
}
_NO_UNIT = Code("1", "UCUM", "no units")


def make_content(
    report: Mapping[str, Any],
    context: DerivationContext,
    sop_instance_uid: str,
    *,
    enhancing_ml: float,
    threshold: float,
) -> MeasurementReport:
    """The content tree.

    Args:
        report: what `report.json` says of how the result came about: acquisition, quality, series.
        context: what made the signal.
        sop_instance_uid: of the document; every UID inside follows from it.
        enhancing_ml: volume of predicted enhancement above the threshold.
        threshold: white matter = 1.
    """
    device = highdicom.sr.DeviceObserverIdentifyingAttributes(
        uid=INSTANCE_CREATOR_UID,
        name=PRODUCT_NAME,
        manufacturer_name=PRODUCT_NAME,
        model_name=f"{PRODUCT_NAME} {context.software_version}",
    )
    groups = {
        "Acquisition": [_known(name, value) for name, value in report["acquisition"].items()],
        "Quality": [_figure(figure) for figure in report["quality"]],
        "Prediction": _prediction(context, enhancing_ml, threshold),
    }
    algorithm = AlgorithmIdentification(
        name=context.model_id,
        version=context.model_version,
        parameters=[f"sha256={context.model_sha256}", f"threshold={threshold:g}"],
        family=codes.DCM.ArtificialIntelligence if context.is_learned else codes.DCM.AdaptiveFiltering,
    )
    content = MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=ObserverContext(codes.DCM.Device, device),
        ),
        procedure_reported=_MR,
        imaging_measurements=[
            _group(name, found, name_part(sop_instance_uid, name), algorithm if name == "Prediction" else None)
            for name, found in groups.items()
        ],
        title=codes.DCM.ImagingMeasurementReport,
    )
    content[0].ContentSequence.extend(_comments(report, context))
    return content


def _group(
    name: str, found: Sequence[Dataset], tracking_uid: str, algorithm: AlgorithmIdentification | None
) -> MeasurementsAndQualitativeEvaluations:
    """One measurement group (TID 1501); what is not a number follows the numbers as text."""
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=tracking_uid, identifier=name),
        algorithm_id=algorithm,
        finding_type=ENHANCEMENT if algorithm else None,
        finding_sites=[FindingSite(codes.SCT.Brain)] if algorithm else None,
    )
    group[0].ContentSequence.extend(found)
    return group


def _known(name: str, known: Mapping[str, Any]) -> Dataset:
    """A value of the acquisition and where it comes from; without a number where it is unknown or a word."""
    value, source = known["value"], known["source"]
    if isinstance(value, int | float):
        return _number(_name(name), value, _unit(name), [_text(_SOURCE, source)])
    said = source if value is None else f"{value} ({source})"
    return _text(_name(name), said, RelationshipTypeValues.CONTAINS)


def _figure(figure: Mapping[str, Any]) -> Dataset:
    verdict = str(figure["verdict"])
    coded = CodeContentItem(
        _VERDICT, Code(verdict.upper(), CODING_SCHEME, verdict), RelationshipTypeValues.HAS_PROPERTIES
    )
    meaning = _text(_LIMIT, str(figure["reason"]))
    unit = _NO_UNIT if figure["unit"] == "1" else Code(figure["unit"], "UCUM", figure["unit"])
    return _number(_name(figure["name"]), figure["value"], unit, [coded, meaning])


def _prediction(context: DerivationContext, enhancing_ml: float, threshold: float) -> list[Dataset]:
    said = f"voxels whose predicted enhancement exceeds {threshold:g} of white matter: vessels as well as lesions"
    found = [_number(codes.SCT.Volume, round(enhancing_ml, 3), Code("mL", "UCUM", "mL"), [_text(_LIMIT, said)])]
    if context.simulated_dose_mmol_per_kg is not None:
        simulated = [_text(_SOURCE, "simulated: this dose was not injected")]
        name = "simulated_dose_mmol_per_kg"
        found.append(_number(_name(name), context.simulated_dose_mmol_per_kg, _unit(name), simulated))
    return found


def _comments(report: Mapping[str, Any], context: DerivationContext) -> Iterable[Dataset]:
    """What must be said, and the reasons, under the root of the tree."""
    comments = [
        f"{context.notice[:1].upper()}{context.notice[1:]}. Nothing in the derived images was acquired.",
        f"Model {context.model_id} version {context.model_version}, SHA-256 {context.model_sha256}",
    ]
    if context.card_sha256:
        comments.append(f"Model card SHA-256 {context.card_sha256}")
    comments += [f"Series chosen because: {witness}" for witness in report["series"]["witnesses"]]
    comments += [f"Set aside: {what}" for what in report["series"]["set_aside"]]
    return [_text(codes.DCM.Comment, comment, RelationshipTypeValues.CONTAINS) for comment in comments]


def _number(name: Code, value: float, unit: Code, properties: Sequence[Dataset]) -> Dataset:
    """A measurement (TID 300) with what is said about it."""
    item = Measurement(name=name, value=value, unit=unit)[0]
    item["ContentSequence"] = DataElement("ContentSequence", "SQ", [*item.get("ContentSequence", ()), *properties])
    return item


def _text(
    name: Code, value: str, relationship: RelationshipTypeValues = RelationshipTypeValues.HAS_PROPERTIES
) -> Dataset:
    return TextContentItem(name, value, relationship)


def _name(keyword: str) -> Code:
    """A standard code where there is one, else our own: the keyword without its unit."""
    if keyword in _NAMES:
        return _NAMES[keyword]
    words, _ = in_words(keyword)
    return Code(re.sub(r"[^A-Z0-9]", "", words.upper())[:16], CODING_SCHEME, words.capitalize())


def _unit(keyword: str) -> Code:
    """The unit that the keyword ends with."""
    _, unit = in_words(keyword)
    return Code(unit, "UCUM", unit) if unit else _NO_UNIT
