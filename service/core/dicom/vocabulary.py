"""The words that technologists write in descriptions: of contrast agent, of body parts, of kinds of images.

Hides the languages (English, German, French, Italian, Spanish, Japanese, Chinese) and how their words are told apart.
Must never read a header, only text; and never know the names of agents, which `models.agents` keeps.
"""

from __future__ import annotations

import re
import unicodedata


def words(text: str) -> list[str]:
    """The words of a series description, lower case; digits end a word, `+C` and `w/o` count as words.

    What Japanese and Chinese descriptions say of contrast agent comes as the English word.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    for pattern, english in _IN_ENGLISH:
        plain = pattern.sub(f" {english} ", plain)
    plain = re.sub(r"[\u3040-\u30ff\u3400-\u9fff]+", r" \g<0> ", plain)  # these scripts have no spaces
    return re.findall(r"w/o|\+c\b|\bc\+|\+gd\b|\bgd\+|[^\W\d_]+\d?", plain)


# --- contrast agent ---------------------------------------------------------------------------------------------------


def is_no_agent(text: str) -> bool:
    """Whether a text in the place of an agent says that there was none, as an empty one does."""
    return text.casefold() in _NO_AGENT


def contrast_said(text: str, *, names_agent: bool = False) -> int | None:
    """Whether a description speaks of contrast agent: +1, or denies it: -1; 0 when it does both, None when neither.

    Args:
        text: the description.
        names_agent: somebody who knows the agents has found one in it.
    """
    said = words(text)
    without, after = any(map(_WITHOUT.fullmatch, said)), any(map(_AFTER.fullmatch, said))
    agent = names_agent or any(map(_AGENT.fullmatch, said))
    if not (without or after or agent):
        return None
    return int((after or agent) and not without) - int(without and not after)


_NO_AGENT = frozenset(
    {"", "-", "0", "n", "nein", "nil", "no", "no contrast", "none", "nativ", "native", "without"}
    | {"なし", "無し", "無", "无"}
)

_WITHOUT = re.compile(
    r"pre(?:gd|gad|gado|con|contrast|km|kontrast)?|nativ\w*|ohne|without|w/o|wo|sans|senza|sin|non|noncon\w*|plain|vor"
    r"|avant|unenhanced"
)
_AFTER = re.compile(r"post(?:gd|gad|gado|con|contrast|km|kontrast)?|nach|apres|after|with|mit|avec|delayed|enhanced")
_AGENT = re.compile(r"km|kontrast\w*|contrast\w*|ce|gd|gad|gado\w*|\+c|c\+|\+gd|gd\+")

# Japanese and Chinese, which write no spaces: in the place of these, `words` puts an English word.
_CJK_AGENT = "(?:造影|显影|顯影|增强|增強|増強)[剤剂劑]?"
_CJK_INJECTION = "(?:注[射药藥入]|静注|打[药藥]|投[与與药藥])"
_CJK_EXAMINATION = f"(?:{_CJK_INJECTION}|[扫掃]描|[検检檢][査查]|[撮摄攝][影像])?"
_CJK_FRONTAL = "[額额]|[頭头](?![部颅顱])|[颅顱][窝窩]"  # after 前: plane, lobe, sinus, or the anterior fossa
_CJK_BEFORE = f"{_CJK_EXAMINATION}前(?!{_CJK_FRONTAL})"
_CJK_WITHOUT = rf"なし|無し|(?:を?使用)?(?:せず|しない)|\([-\u2212ー]\)|{_CJK_BEFORE}"
_IN_ENGLISH = (
    (
        re.compile(
            rf"[非無无未不]{_CJK_AGENT}|{_CJK_AGENT}\s*(?:{_CJK_WITHOUT})|{_CJK_INJECTION}\s*{_CJK_BEFORE}"
            r"|単純|平[扫掃]"
        ),
        "unenhanced",
    ),
    (re.compile(rf"{_CJK_AGENT}(?:\s*{_CJK_EXAMINATION}[後后])?|{_CJK_INJECTION}\s*[後后]"), "enhanced"),
)


# --- body parts -------------------------------------------------------------------------------------------------------


def body_part(text: str) -> str | None:
    """Another body part than the head that a text names; "" where it names the head, None where it names neither."""
    said = set(words(text))
    if said & _HEAD:
        return ""
    return min(said & _ELSEWHERE, default=None)


_HEAD = frozenset(
    {"brain", "cerebral", "cerebro", "cerveau", "cranial", "cranio", "crane", "encefalo", "encephale", "gehirn", "head"}
    | {"headneck", "hirn", "kopf", "schadel", "schädel", "skull", "tete", "tête", "testa", "cabeza"}
)
# Body Part Examined (PS3.16 annex L), and what technologists write.
_ELSEWHERE = frozenset(
    {"abdomen", "ankle", "arm", "breast", "bws", "cardiac", "chest", "coccyx", "cspine", "ctspine", "elbow"}
    | {"extremity", "finger", "foot", "forearm", "genou", "hals", "hand", "heart", "herz", "hip", "hws", "kidney"}
    | {"knee", "knie"}
    | {"leg", "liver", "lspine", "lsspine", "lumbar", "lws", "mamma", "neck", "pancreas", "pelvis"}
    | {"prostate", "rachis", "sacrum", "schulter", "shoulder", "spine", "sspine", "thigh", "thorax", "tlspine", "toe"}
    | {"tspine", "uterus", "wirbelsaule", "wirbelsäule", "wholebody", "wrist"}
)


# --- kinds of images --------------------------------------------------------------------------------------------------


def is_other_kind(text: str) -> bool:
    """Whether a description names another kind of image than a T1-weighted one."""
    said = set(words(text))
    return bool(said & _OTHER_KINDS) or ("flair" in said and "t1" not in said)


def is_mp2rage(text: str) -> bool:
    """Whether a name is that of MP2RAGE or of one of its two inversions."""
    return bool(_MP2RAGE.search(text))


_OTHER_KINDS = frozenset(
    {"aahead", "adc", "asl", "asset", "b0", "bold", "cal", "calibration", "cine", "dsc", "dti", "dwi", "fieldmap"}
    | {"fmri", "loc", "localiser", "localizer", "locator", "mip", "minip", "mra", "mrv", "pd", "perf", "perfusion"}
    | {"plan", "scout", "smartbrain", "sub", "subtraction", "survey", "swan", "swi", "t2", "tof", "trace"}
)
_MP2RAGE = re.compile(r"mp[-_ ]?2[-_ ]?rage|(?<![a-z])inv[-_ ]?[12](?![\d.])", re.IGNORECASE)  # not inv1000, a time
