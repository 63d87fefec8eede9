"""The contrast agent that one series names, by its header and by the site's rules.

Hides free text, brands and codes (PS3.3 C.7.6.4 Contrast/Bolus, C.7.6.4b Enhanced Contrast/Bolus). Must never guess:
two statements that disagree leave the agent unknown, and a site's rule fills in only what the header leaves open.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from models.agents import AGENTS, named_agents
from service.core.dicom.header import administered_agents
from service.core.dicom.values import texts
from worker.read.known import ContradictionError, Known, refuse_differing, tag, with_site
from worker.read.planes import Plane


def read_agent(planes: Sequence[Plane], site: Known[str] | None) -> Known[str]:
    """The agent as a key of models.agents.BY_NAME, by code, by text or by rule.

    Args:
        planes: of the series.
        site: what the site's rules say; None where they say nothing.
    """
    try:
        header = _header_agent(planes)
    except ContradictionError as error:
        return Known.unknown(str(error))
    return with_site(header, site, _same)


def _same(header: Known[str], site: Known[str]) -> Known[str]:
    return header if header.value == site.value else Known.unknown(f"{header.source} and {site.source} disagree")


def _header_agent(planes: Sequence[Plane]) -> Known[str]:
    """The agent by code or by text; what names another kind of agent, or two, is a contradiction."""
    refuse_differing(planes, "ContrastBolusAgent")
    header = planes[0].header
    if set(texts(header, "ContrastBolusIngredient")) & {"IODINE", "BARIUM", "CARBON DIOXIDE", "XENON"}:
        raise ContradictionError(f"{tag('ContrastBolusIngredient')} is not gadolinium")
    found: dict[str, str] = {}
    for item in administered_agents(header):
        found |= dict.fromkeys(_coded_agents(item), "code (0018,0012)")
    text = " ".join(texts(header, "ContrastBolusAgent"))
    for agent in named_agents(text):
        found.setdefault(agent.name, "text (0018,0010)")
    if len(found) > 1:
        raise ContradictionError(f"several agents in (0018,0010) and (0018,0012): {', '.join(sorted(found))}")
    if not found:
        return Known.unknown(f"{tag('ContrastBolusAgent')} {'names no known agent' if text else 'is missing or empty'}")
    return Known(*found.popitem())


_NO_AGENT_IN_PARTICULAR = (Code("7140000", "SCT", "Contrast agent"), Code("768763008", "SCT", "Gadolinium agent"))


def _coded_agents(item: Dataset) -> list[str]:
    """The agents that a code and its meaning name; older SRT codes count as the SCT codes that replaced them.

    Raises:
        ContradictionError: the code stands for something else than a gadolinium agent that is known here.
    """
    parts = [" ".join(texts(item, key)) for key in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")]
    code = Code(*parts)
    by_code = [agent.name for agent in AGENTS if agent.sct_code and code == Code(agent.sct_code, "SCT", "")]
    named = [agent.name for agent in named_agents(code.meaning)]
    if not by_code and not named and code not in _NO_AGENT_IN_PARTICULAR:
        raise ContradictionError("a code of (0018,0012) is no known gadolinium agent")
    return [*by_code, *named]
