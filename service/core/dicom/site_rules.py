"""What a site knows of its own protocols: which series is which, which agent is used and what dose is injected.

A rule is a `[[protocols]]` table of the site file.

Hides how names are matched. Must never let one rule silently outrank another: all that match count, and the caller is
told when they disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydicom.dataset import Dataset

from service.core.dicom.values import texts

KEYWORDS = {  # pattern of a rule: the attribute it is compared with
    "protocol_name": "ProtocolName",
    "series_description": "SeriesDescription",
    "station_name": "StationName",
}
Role = Literal["pre", "low", "ignore"]
AgentName = Literal[  # the generic names of models.agents, which the service cannot import; a test compares them
    "gadobutrol",
    "gadoterate",
    "gadoteridol",
    "gadopentetate",
    "gadobenate",
    "gadodiamide",
    "gadoversetamide",
    "gadoxetate",
    "gadopiclenol",
]
QUANTITIES = ("role", "agent", "dose_mmol_per_kg")
DOSE_RANGE_MMOL_PER_KG = (0.003, 0.35)  # chosen: what lies outside is a slip of volume, weight or unit


class SiteRule(BaseModel):
    """One rule: series whose names match all of its patterns have this role, agent and dose.

    Patterns are those of a shell (`*`, `?`, `[abc]`); upper and lower case do not matter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,63}$", description="How reports name the rule")
    protocol_name: str | None = Field(default=None, min_length=1, description="Pattern of ProtocolName")
    series_description: str | None = Field(default=None, min_length=1, description="Pattern of SeriesDescription")
    station_name: str | None = Field(default=None, min_length=1, description="Pattern of StationName")
    role: Role | None = Field(default=None, description="pre, low, or ignore for series that are never input")
    agent: AgentName | None = Field(default=None, description="Generic name of the contrast agent")
    dose_mmol_per_kg: float | None = Field(
        default=None, ge=DOSE_RANGE_MMOL_PER_KG[0], le=DOSE_RANGE_MMOL_PER_KG[1], description="Injected dose, mmol/kg"
    )

    @model_validator(mode="after")
    def _is_of_use(self) -> Self:
        if not any(getattr(self, pattern) for pattern in KEYWORDS):
            raise ValueError(f"no pattern: give one of {', '.join(KEYWORDS)}")
        if all(getattr(self, quantity) is None for quantity in QUANTITIES):
            raise ValueError(f"says nothing: give one of {', '.join(QUANTITIES)}")
        if self.role in ("pre", "ignore") and (self.agent or self.dose_mmol_per_kg):
            raise ValueError(f"a series of the role {self.role} has neither agent nor dose")
        return self

    def matches(self, names: Mapping[str, str]) -> bool:
        """Whether all patterns fit the names, which `names_of` gives."""
        patterns = {key: pattern for key in KEYWORDS if (pattern := getattr(self, key))}
        return all(fnmatchcase(names[key].casefold(), pattern.casefold()) for key, pattern in patterns.items())


def names_of(header: Dataset) -> dict[str, str]:
    """What rules are compared with. The names may identify a patient: they are matched, and not kept."""
    return {key: " ".join(texts(header, keyword)) for key, keyword in KEYWORDS.items()}


def stated(rules: Iterable[SiteRule], names: Mapping[str, str], quantity: str) -> dict[Any, str]:
    """What the matching rules say of one of QUANTITIES: the name of a rule by value. More than one: they disagree."""
    found: dict[Any, str] = {}
    for rule in rules:
        value = getattr(rule, quantity)
        if value is not None and rule.matches(names):
            found.setdefault(value, rule.name)
    return found


def role_of(rules: Iterable[SiteRule], names: Mapping[str, str]) -> str:
    """The role that the rules give; empty when they give none, `unclear` when they disagree."""
    found = stated(rules, names, "role")
    return "unclear" if len(found) > 1 else next(iter(found), "")
