"""Gadolinium agents: names, concentration, standard dose and relaxivity, with the source of every number.

Hides the spelling of agents in headers and the interpolation of relaxivity over field strength. Must never guess: a
text that names no agent, or two, gives None.

Sources. r1 in whole blood at 37 C for 1.5, 3 and 7 T: Shen et al., Invest Radiol 2015;50:330-338. Gadopiclenol is not
in that table: values in plasma at 1.5 and 3 T, from a secondary source, held constant above 3 T. Plasma reads higher
than blood (gadobutrol at 3 T 4.97 in plasma: Szomolanyi et al., Invest Radiol 2019;54:559-564), so that its effective
dose is overstated by perhaps a tenth. Concentrations, standard doses and mg/mL: product labels. Codes: DICOM PS3.16
CID 12 (2024c), scheme SCT; gadopiclenol has no code there.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agent:
    """One contrast agent."""

    name: str  # generic name
    spellings: tuple[str, ...]  # brands and abbreviations, upper case, beside the generic name
    concentration_mmol_per_ml: float
    standard_dose_mmol_per_kg: float
    label_mg_per_ml: float  # of the active ingredient
    r1_per_mm_s: tuple[tuple[float, float], ...]  # (field strength T, r1 in 1/(mM s)), ascending
    sct_code: str | None  # SNOMED CT code of the agent in CID 12
    sct_meaning: str | None

    def relaxivity_per_mm_s(self, field_strength_t: float) -> float:
        """r1(B) in 1/(mM s): linear between the tabulated field strengths, constant outside them."""
        fields, values = zip(*self.r1_per_mm_s, strict=True)
        return float(np.interp(field_strength_t, fields, values))


def _shen(r_15: float, r_3: float, r_7: float) -> tuple[tuple[float, float], ...]:
    return ((1.5, r_15), (3.0, r_3), (7.0, r_7))


AGENTS: tuple[Agent, ...] = (
    Agent("gadobutrol", ("GADOVIST", "GADAVIST", "GD-BT-DO3A"), 1.0, 0.1, 604.72, _shen(4.6, 4.5, 4.2),
          "407976008", "Gadobutrol"),
    Agent("gadoterate", ("DOTAREM", "CLARISCAN", "ARTIREM", "CYCLOLUX", "DOTAGRAF", "GADOTERIC ACID", "GD-DOTA"),
          0.5, 0.1, 376.9, _shen(3.9, 3.4, 2.8), "712714000", "Gadoterate meglumine"),
    Agent("gadoteridol", ("PROHANCE", "GD-HP-DO3A"), 0.5, 0.1, 279.3, _shen(4.4, 3.5, 3.4),
          "353946009", "Gadoteridol"),
    Agent("gadopentetate", ("MAGNEVIST", "MAGNOGRAF", "GADOPENTETIC ACID", "GD-DTPA"), 0.5, 0.1, 469.01,
          _shen(4.3, 3.8, 3.1), "109216000", "Gadopentetate dimeglumine"),
    Agent("gadobenate", ("MULTIHANCE", "GADOBENIC ACID", "GD-BOPTA"), 0.5, 0.1, 529.0, _shen(6.2, 5.4, 4.7),
          "792865009", "Gadobenate dimeglumine"),
    Agent("gadodiamide", ("OMNISCAN", "GD-DTPA-BMA"), 0.5, 0.1, 287.0, _shen(4.5, 3.9, 3.7),
          "354088005", "Gadodiamide"),
    Agent("gadoversetamide", ("OPTIMARK",), 0.5, 0.1, 330.9, _shen(4.4, 4.2, 4.3), "409477004", "Gadoversetamide"),
    Agent("gadoxetate", ("PRIMOVIST", "EOVIST", "GADOXETIC ACID", "GD-EOB-DTPA"), 0.25, 0.025, 181.43,
          _shen(7.2, 5.5, 4.9), "440223009", "Gadoxetate disodium"),
    Agent("gadopiclenol", ("ELUCIREM", "VUEWAY"), 0.5, 0.05, 485.1, ((1.5, 12.8), (3.0, 11.6)), None, None),
)  # fmt: skip

BY_NAME: dict[str, Agent] = {agent.name: agent for agent in AGENTS}


def find_agent(text: str) -> Agent | None:
    """The agent that a free text names, or None where it names none or more than one."""
    found = named_agents(text)
    return found[0] if len(found) == 1 else None


def named_agents(text: str) -> list[Agent]:
    """All agents that a free text names.

    Upper and lower case, accents, spaces and hyphens do not matter; the longest spelling at a place wins, so that
    `Gd-DTPA-BMA` is gadodiamide and not gadopentetate.
    """
    flat = _flatten(text)
    found: list[tuple[int, int, Agent]] = []
    for agent in AGENTS:
        for spelling in (agent.name, *agent.spellings):
            found += [(m.start(), m.end(), agent) for m in re.finditer(re.escape(_flatten(spelling)), flat)]
    kept = {a.name for s, e, a in found if not any(s2 <= s and e <= e2 and (e2 - s2) > (e - s) for s2, e2, _ in found)}
    return [agent for agent in AGENTS if agent.name in kept]


def _flatten(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Z0-9]", "", plain.upper())
