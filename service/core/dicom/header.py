"""What one header says: values, wherever they stand, and whether the image is T1, with contrast agent, or made by us.

Hides where attributes stand in classic MR (PS3.3 A.4) and in Enhanced MR (functional groups, PS3.3 C.7.6.16), and the
habits of scanners. The one set of rules for intake, which asks of headers as they arrive, and for the worker. Must
never touch pixels.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.valuerep import PersonName

PRODUCT_NAME = "lowgad"  # with the private block, how our own images are recognised
PRIVATE_GROUP, PRIVATE_CREATOR = 0x4C47, "LOWGAD SYNTHCE 1"


# --- values -----------------------------------------------------------------------------------------------------------


def values(header: Dataset, keyword: str) -> Iterator[Any]:
    """Every value of an element that is not empty: of the header itself, then of its functional groups in order."""
    return (value for group in _groups(header) if (value := group.get(keyword)) not in (None, ""))


def _groups(header: Dataset) -> Iterator[Dataset]:
    """Where an attribute may stand: the header, then each item of the shared and of every frame's functional groups."""
    yield header
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        sequence: Any = header.get(keyword)
        for group in sequence or ():
            yield group
            for element in group:
                if element.VR == "SQ" and not element.is_private:
                    yield from element.value or ()


def texts(header: Dataset, keyword: str) -> list[str]:
    """All values of an element as stripped text, empty ones left out.

    Text that its reader kept as bytes, since it is not in the stated character set, comes with a letter for each byte.
    """
    value: Any = next(values(header, keyword), None)
    several = value if isinstance(value, MultiValue | list) else [value]
    found = [_text(item).strip() for item in several if item is not None]
    return [text for text in found if text]


def _text(value: Any) -> str:
    if isinstance(value, PersonName) and "\N{REPLACEMENT CHARACTER}" in str(value):
        value = value.original_string
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def numbers(header: Dataset, keyword: str) -> list[float]:
    """All values of a numeric element as finite floats; empty when absent or when any of them is not a number.

    A decimal comma, which some consoles write, is read as a point.
    """
    try:
        found = [float(text.replace(",", ".")) for text in texts(header, keyword)]
    except ValueError:
        return []
    return found if all(map(math.isfinite, found)) else []


def number(header: Dataset, *keywords: str) -> float | None:
    """The first number that one of these elements holds; None when none of them does."""
    return next((found[0] for keyword in keywords if (found := numbers(header, keyword))), None)


def items(header: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; empty when the element is absent or is no sequence."""
    value = next(values(header, keyword), None)
    return list(value) if isinstance(value, Sequence) else []


def _set_of(header: Dataset, *keywords: str) -> set[str]:
    return {text.upper() for keyword in keywords for text in texts(header, keyword)}


# --- what the image is ------------------------------------------------------------------------------------------------


def is_synthetic(header: Dataset) -> bool:
    """Whether lowgad or its like made the image: SyntheticData is YES, or the maker or a private block is ours."""
    makers = {maker.casefold() for key in ("Manufacturer", "ManufacturerModelName") for maker in texts(header, key)}
    marked = PRIVATE_CREATOR in header.private_creators(PRIVATE_GROUP)
    return "YES" in _set_of(header, "SyntheticData") or PRODUCT_NAME in makers or marked


_NO_AGENT = frozenset(
    {"", "-", "0", "n", "nein", "nil", "no", "no contrast", "none", "nativ", "native", "without"}
    | {"なし", "無し", "無", "无"}
)


def has_contrast(header: Dataset) -> bool:
    """Whether the header says that contrast agent was in the patient when the image was acquired.

    The flag of Enhanced MR (PS3.3 C.7.6.16.2.12) outranks the agent, and so does the phase; an agent whose injection
    started after the acquisition was entered at the console before its time.
    """
    usages = items(header, "ContrastBolusUsageSequence") or [header]
    administered = {text for usage in usages for text in _set_of(usage, "ContrastBolusAgentAdministered")}
    if administered:
        return "YES" in administered
    if {text for usage in usages for text in _set_of(usage, "ContrastBolusAgentPhase")} == {"PRE_CONTRAST"}:
        return False
    entered = " ".join(texts(header, "ContrastBolusAgent")).casefold() not in _NO_AGENT
    amounts = (number(header, "ContrastBolusVolume") or 0) + (number(header, "ContrastBolusTotalDose") or 0)
    is_entered = entered or amounts > 0 or bool(items(header, "ContrastBolusAgentSequence"))
    return is_entered and not _precedes_injection(header)


def administered_agents(header: Dataset) -> list[Dataset]:
    """Items of ContrastBolusAgentSequence, without those that Enhanced MR says were not yet in the patient."""
    usages = items(header, "ContrastBolusUsageSequence")
    absent = {
        number(usage, "ContrastBolusAgentNumber")
        for usage in usages
        if _set_of(usage, "ContrastBolusAgentAdministered") == {"NO"}
    }
    agents = items(header, "ContrastBolusAgentSequence")
    return [agent for agent in agents if number(agent, "ContrastBolusAgentNumber") not in absent - {None}]


def _precedes_injection(header: Dataset) -> bool:
    (_, started), (_, acquired) = (date_and_time(header, event) for event in ("ContrastBolusStart", "Acquisition"))
    return bool(started and acquired and acquired < started)


def date_and_time(header: Dataset, event: str) -> tuple[str, str]:
    """Date (YYYYMMDD) and time (HHMMSS.FFFFFF) of an event as text that sorts; empty what is unknown.

    An acquisition may have both in Acquisition DateTime alone (PS3.3 C.7.6.1), or in that of the frame.
    """
    date, clock = (next(iter(texts(header, f"{event}{part}")), "") for part in ("Date", "Time"))
    if not clock and event == "Acquisition":
        date, clock = acquisition_date_and_time(header)
    clock = clock.replace(":", "")
    is_time = re.fullmatch(r"\d{2,6}(\.\d*)?", clock)
    return date.replace(".", ""), f"{float(clock.ljust(6, '0')):013.6f}" if is_time else ""


def acquisition_date_and_time(header: Dataset) -> tuple[str, str]:
    """Date and time as written in the DateTime of the frame or the acquisition, without the offset from UTC."""
    written = next(iter(texts(header, "FrameAcquisitionDateTime") or texts(header, "AcquisitionDateTime")), "")
    clock = re.split(r"[+-]", written)[0]
    return clock[:8], clock[8:]


def words(text: str) -> list[str]:
    """The words of a series description, lower case; digits end a word, `+C` and `w/o` count as words.

    What Japanese and Chinese descriptions say of contrast agent comes as the English word.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    for pattern, english in _IN_ENGLISH:
        plain = pattern.sub(f" {english} ", plain)
    plain = re.sub(r"[\u3040-\u30ff\u3400-\u9fff]+", r" \g<0> ", plain)  # these scripts have no spaces
    return re.findall(r"w/o|\+c\b|\bc\+|\+gd\b|\bgd\+|[^\W\d_]+\d?", plain)


_AGENT = "(?:造影|显影|顯影|增强|增強|増強)[剤剂劑]?"
_INJECTION = "(?:注[射药藥入]|静注|打[药藥]|投[与與药藥])"
_EXAMINATION = f"(?:{_INJECTION}|[扫掃]描|[検检檢][査查]|[撮摄攝][影像])?"
_FRONTAL = "[額额]|[頭头](?![部颅顱])|[颅顱][窝窩]"  # after 前: plane, lobe, sinus, or the anterior fossa
_BEFORE = f"{_EXAMINATION}前(?!{_FRONTAL})"
_WITHOUT = rf"なし|無し|(?:を?使用)?(?:せず|しない)|\([-\u2212ー]\)|{_BEFORE}"
_IN_ENGLISH = (
    (
        re.compile(rf"[非無无未不]{_AGENT}|{_AGENT}\s*(?:{_WITHOUT})|{_INJECTION}\s*{_BEFORE}|単純|平[扫掃]"),
        "unenhanced",
    ),
    (re.compile(rf"{_AGENT}(?:\s*{_EXAMINATION}[後后])?|{_INJECTION}\s*[後后]"), "enhanced"),
)

_HEAD = frozenset(
    {"brain", "cerebral", "cerebro", "cerveau", "cranial", "cranio", "crane", "encefalo", "encephale", "gehirn", "head"}
    | {"headneck", "hirn", "kopf", "schadel", "schädel", "skull", "tete", "tête", "testa", "cabeza"}
)
# Body Part Examined (PS3.16 annex L), and what technologists write.
_ELSEWHERE = frozenset(
    {
        "abdomen",
        "ankle",
        "arm",
        "breast",
        "bws",
        "cardiac",
        "chest",
        "coccyx",
        "cspine",
        "ctspine",
        "elbow",
        "extremity",
    }
    | {"finger", "foot", "forearm", "genou", "hals", "hand", "heart", "herz", "hip", "hws", "kidney", "knee", "knie"}
    | {"leg", "liver", "lspine", "lsspine", "lumbar", "lws", "mamma", "neck", "pancreas", "pelvis"}
    | {"prostate", "rachis", "sacrum", "schulter", "shoulder", "spine", "sspine", "thigh", "thorax", "tlspine", "toe"}
    | {"tspine", "uterus", "wirbelsaule", "wirbelsäule", "wholebody", "wrist"}
)


def other_body_part(header: Dataset) -> str:
    """The body part, where a header says that it is not the head; empty where it says head, or nothing that we know.

    The description outranks Body Part Examined, which many consoles set once for the whole exam. The answer is a word
    of ours, not the header's.
    """
    for keywords in (("SeriesDescription", "ProtocolName"), ("BodyPartExamined",)):
        said = set(words(" ".join(text for keyword in keywords for text in texts(header, keyword))))
        if said & _HEAD:
            return ""
        if said & _ELSEWHERE:
            return min(said & _ELSEWHERE)
    return ""


_OTHER_KINDS = frozenset(
    {"aahead", "adc", "asl", "asset", "b0", "bold", "cal", "calibration", "cine", "dsc", "dti", "dwi", "fieldmap"}
    | {"fmri", "loc", "localiser", "localizer", "locator", "mip", "minip", "mra", "mrv", "pd", "perf", "perfusion"}
    | {"plan", "scout", "smartbrain", "sub", "subtraction", "survey", "swan", "swi", "t2", "tof", "trace"}
)
_OTHER_IMAGE_TYPES = frozenset(
    {"ADC", "DIFFUSION", "IMAGINARY", "LOCALIZER", "MIN IP", "MIP", "MPR", "PHASE MAP", "PROJECTION IMAGE", "REAL"}
    | {"REFORMATTED", "SUB", "SUBTRACTION", "T1 MAP", "UNI", "UNIFORM", "P", "I", "R"}
)
_MP2RAGE = re.compile(r"mp[-_ ]?2[-_ ]?rage|(?<![a-z])inv[-_ ]?[12](?![\d.])", re.IGNORECASE)  # not inv1000, a time


def why_not_t1(header: Dataset, *, is_vouched_for: bool = False) -> str:
    """Why this is not an acquired T1 image, or an empty text when it looks like one.

    Args:
        header: of one image.
        is_vouched_for: somebody else knows that the sequence is T1; only its being acquired is judged.
    """
    if "MR" not in _set_of(header, "Modality"):
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
    described = set(words(" ".join(texts(header, "SeriesDescription") or texts(header, "ProtocolName"))))
    if described & _OTHER_KINDS or ("flair" in described and "t1" not in described):
        return "named as another kind of image"
    names = [text for keyword in ("SeriesDescription", "ProtocolName") for text in texts(header, keyword)]
    return "named as MP2RAGE" if any(_MP2RAGE.search(name) for name in names) else ""


def _why_not_t1_timing(header: Dataset) -> str:
    """Short echo; inversion of 0.3 to 1.5 s or no long repetition; neither echo-planar nor angiography.

    A gradient echo has no steady state with a long repetition time: a long one is that of the inversion (MPRAGE).
    Beyond 3.5 s (MP2RAGE) fluid is before its null at the shorter of these inversion times, where an agent darkens it.
    """
    repetition_ms, echo_ms = number(header, "RepetitionTime"), number(header, "EchoTime", "EffectiveEchoTime")
    kinds = _set_of(header, "ScanningSequence", "EchoPulseSequence")
    inversion_ms = number(header, "InversionTime") or number(header, "InversionTimes") or 0.0
    if repetition_ms is None or echo_ms is None:
        return "echo or repetition time is missing"
    if "EP" in kinds or "YES" in _set_of(header, "EchoPlanarPulseSequence") or "Y" in _set_of(header, "AngioFlag"):
        return "echo-planar or angiographic images"
    is_gradient = bool(kinds & {"GR", "GRADIENT"}) and not kinds & {"SE", "SPIN"}
    is_prepared = "IR" in kinds or "YES" in _set_of(header, "InversionRecovery")
    is_prepared |= is_gradient or "MP" in _set_of(header, "SequenceVariant")
    longest_repetition_ms = 1e4 if inversion_ms and not is_gradient else 3500 if is_prepared else 1500
    if echo_ms > (12 if is_gradient else 35) or repetition_ms > longest_repetition_ms:
        return "echo or repetition time is not that of a T1 sequence"
    return "" if not inversion_ms or 300 <= inversion_ms <= 1500 else "inversion time is not that of a T1 sequence"
