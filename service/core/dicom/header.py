"""What one header says the image is: acquired or made by us, of the head, T1-weighted, with contrast agent.

Hides which attributes say so (PS3.3 A.4, A.36) and the habits of scanners. The one set of rules for intake, which asks
of headers as they arrive, and for the worker. Must never touch pixels.
"""

from __future__ import annotations

from pydicom.dataset import Dataset

from service.core.dicom.values import date_and_time, items, number, terms, texts
from service.core.dicom.vocabulary import body_part, is_mp2rage, is_no_agent, is_other_kind

PRODUCT_NAME = "lowgad"  # with the private block, how our own images are recognised
PRIVATE_GROUP, PRIVATE_CREATOR = 0x4C47, "LOWGAD SYNTHCE 1"


def is_synthetic(header: Dataset) -> bool:
    """Whether lowgad or its like made the image: SyntheticData is YES, or the maker or a private block is ours."""
    makers = {maker.casefold() for key in ("Manufacturer", "ManufacturerModelName") for maker in texts(header, key)}
    marked = PRIVATE_CREATOR in header.private_creators(PRIVATE_GROUP)
    return "YES" in terms(header, "SyntheticData") or PRODUCT_NAME in makers or marked


def has_contrast(header: Dataset) -> bool:
    """Whether the header says that contrast agent was in the patient when the image was acquired.

    The flag of Enhanced MR (PS3.3 C.7.6.16.2.12) outranks the agent, and so does the phase; an agent whose injection
    started after the acquisition was entered at the console before its time.
    """
    usages = items(header, "ContrastBolusUsageSequence") or [header]
    administered = {text for usage in usages for text in terms(usage, "ContrastBolusAgentAdministered")}
    if administered:
        return "YES" in administered
    if {text for usage in usages for text in terms(usage, "ContrastBolusAgentPhase")} == {"PRE_CONTRAST"}:
        return False
    entered = not is_no_agent(" ".join(texts(header, "ContrastBolusAgent")))
    amounts = (number(header, "ContrastBolusVolume") or 0) + (number(header, "ContrastBolusTotalDose") or 0)
    is_entered = entered or amounts > 0 or bool(items(header, "ContrastBolusAgentSequence"))
    return is_entered and not _precedes_injection(header)


def administered_agents(header: Dataset) -> list[Dataset]:
    """Items of ContrastBolusAgentSequence, without those that Enhanced MR says were not yet in the patient."""
    usages = items(header, "ContrastBolusUsageSequence")
    absent = {
        number(usage, "ContrastBolusAgentNumber")
        for usage in usages
        if terms(usage, "ContrastBolusAgentAdministered") == {"NO"}
    }
    agents = items(header, "ContrastBolusAgentSequence")
    return [agent for agent in agents if number(agent, "ContrastBolusAgentNumber") not in absent - {None}]


def _precedes_injection(header: Dataset) -> bool:
    (_, started), (_, acquired) = (date_and_time(header, event) for event in ("ContrastBolusStart", "Acquisition"))
    return bool(started and acquired and acquired < started)


def other_body_part(header: Dataset) -> str:
    """The body part, where a header says that it is not the head; empty where it says head, or nothing that we know.

    The description outranks Body Part Examined, which many consoles set once for the whole exam. The answer is a word
    of ours, not the header's.
    """
    for keywords in (("SeriesDescription", "ProtocolName"), ("BodyPartExamined",)):
        part = body_part(" ".join(text for keyword in keywords for text in texts(header, keyword)))
        if part is not None:
            return part
    return ""


# Defined terms of ImageType (PS3.3 C.8.3.1.1.1, C.7.6.1.1.2) and what vendors write there.
_OTHER_IMAGE_TYPES = frozenset(
    {"ADC", "DIFFUSION", "IMAGINARY", "LOCALIZER", "MIN IP", "MIP", "MPR", "PHASE MAP", "PROJECTION IMAGE", "REAL"}
    | {"REFORMATTED", "SUB", "SUBTRACTION", "T1 MAP", "UNI", "UNIFORM", "P", "I", "R"}
)


def why_not_t1(header: Dataset, *, is_vouched_for: bool = False) -> str:
    """Why this is not an acquired T1 image, or an empty text when it looks like one.

    Args:
        header: of one image.
        is_vouched_for: somebody else knows that the sequence is T1; only its being acquired is judged.
    """
    if "MR" not in terms(header, "Modality"):
        return "no MR images"
    if part := other_body_part(header):
        return f"images of another body part ({part})"
    image_type = [text.upper() for text in texts(header, "ImageType")]
    if {"DERIVED", "SECONDARY"} & set(image_type[:2]) or set(image_type[2:]) & _OTHER_IMAGE_TYPES:
        return "derived, projected, phase or localizer images"
    if is_vouched_for:
        return ""
    return _why_not_t1_names(header) or _why_not_t1_timing(header)


def _why_not_t1_names(header: Dataset) -> str:
    if is_other_kind(" ".join(texts(header, "SeriesDescription") or texts(header, "ProtocolName"))):
        return "named as another kind of image"
    names = [text for keyword in ("SeriesDescription", "ProtocolName") for text in texts(header, keyword)]
    return "named as MP2RAGE" if any(map(is_mp2rage, names)) else ""


def _why_not_t1_timing(header: Dataset) -> str:
    """Short echo; inversion of 0.3 to 1.5 s or no long repetition; neither echo-planar nor angiography.

    A gradient echo has no steady state with a long repetition time: a long one is that of the inversion (MPRAGE).
    Beyond 3.5 s (MP2RAGE) fluid is before its null at the shorter of these inversion times, where an agent darkens it.
    """
    repetition_ms, echo_ms = number(header, "RepetitionTime"), number(header, "EchoTime", "EffectiveEchoTime")
    kinds = terms(header, "ScanningSequence", "EchoPulseSequence")
    inversion_ms = number(header, "InversionTime") or number(header, "InversionTimes") or 0.0
    if repetition_ms is None or echo_ms is None:
        return "echo or repetition time is missing"
    if "EP" in kinds or "YES" in terms(header, "EchoPlanarPulseSequence") or "Y" in terms(header, "AngioFlag"):
        return "echo-planar or angiographic images"
    is_gradient = bool(kinds & {"GR", "GRADIENT"}) and not kinds & {"SE", "SPIN"}
    is_prepared = "IR" in kinds or "YES" in terms(header, "InversionRecovery")
    is_prepared |= is_gradient or "MP" in terms(header, "SequenceVariant")
    longest_repetition_ms = 1e4 if inversion_ms and not is_gradient else 3500 if is_prepared else 1500
    if echo_ms > (12 if is_gradient else 35) or repetition_ms > longest_repetition_ms:
        return "echo or repetition time is not that of a T1 sequence"
    return "" if not inversion_ms or 300 <= inversion_ms <= 1500 else "inversion time is not that of a T1 sequence"
