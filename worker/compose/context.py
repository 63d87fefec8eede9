"""What decides a result beside its input: the engine, the acquisition it was told, and what the site wants.

Hides which of these makes another result, and so another UID. Must never let two configurations that give different
pixels have one hash, nor what is measured from the input change it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata

from models.agents import BY_NAME
from models.brain import extractor_digest
from models.condition import CONTRACT_VERSION, Conditions
from models.runtime import Engine, LinearEngine
from service.core.job import Kind
from worker.choose.acquisition import Acquisition


@dataclass(frozen=True)
class Outputs:
    """What a site wants of each job."""

    kinds: tuple[Kind, ...] = (Kind.SD, Kind.SD_PLUS)
    watermark: bool = True  # burned into the MR series, outside the head
    dose_factor: float = 1.0  # simulated dose, in standard doses
    threshold: float = 0.1  # of the segmentation, white matter = 1


@dataclass(frozen=True)
class DerivationContext:
    """What made the signal, and when."""

    model_id: str
    model_version: str
    model_sha256: str
    card_sha256: str | None  # of card.toml; None for the linear engine, which has no card
    notice: str  # what must be said about the use of the result
    config_hash: str  # of everything beside model and input that decides the result
    agent: str | None  # generic name
    administered_dose_mmol_per_kg: float | None
    simulated_dose_mmol_per_kg: float | None
    software_version: str
    now: datetime
    series_numbers_in_use: frozenset[int] = frozenset()

    @property
    def is_learned(self) -> bool:
        """True for a network, False for the linear engine."""
        return self.model_id != LinearEngine.name

    @property
    def mark(self) -> str:
        """How image type and series description name what made the result."""
        return "AI SYNTH" if self.is_learned else "LINEAR SYNTH"


_MEASURED = {"sigma": None, "noise_left": None}  # follow from the input, and in their last digits from the machine


def make_context(
    engine: Engine,
    acquisition: Acquisition,
    conditions: Conditions,
    outputs: Outputs,
    *,
    numbers: frozenset[int],
    now: datetime,
) -> DerivationContext:
    """What the derived instances say about their making.

    The configuration hash covers all that decides the result beside the input and the model, so that another software
    version, brain extractor, dose, watermark or execution provider never reuses a UID. Which kinds are made decides
    nothing about any.
    """
    version = metadata.version("lowgad")
    chosen = asdict(outputs) | {"kinds": None}
    made_by = [version, CONTRACT_VERSION, engine.name, engine.provider, extractor_digest()]
    decided = [*made_by, *(asdict(conditions) | _MEASURED | chosen).values()]
    agent = BY_NAME.get(acquisition.agent.value or "")
    return DerivationContext(
        model_id=engine.name,
        model_version=engine.version,
        model_sha256=engine.digest,
        card_sha256=engine.card_digest,
        notice=engine.notice,
        config_hash=hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:32],
        agent=acquisition.agent.value,
        administered_dose_mmol_per_kg=acquisition.dose_mmol_per_kg.value,
        simulated_dose_mmol_per_kg=agent.standard_dose_mmol_per_kg * outputs.dose_factor if agent else None,
        software_version=version,
        now=now,
        series_numbers_in_use=numbers,
    )
