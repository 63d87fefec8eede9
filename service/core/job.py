"""A job: one attempt-counted unit of work over a fixed set of instances of one study, and the one table of its states.

Hides nothing but the rules: which state may follow which. `service.core.ledger` is the only writer of states. Must
never hold pixels or patient data beyond the identifiers of DICOM objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from service.core.errors import Outcome, Reason


class State(Enum):
    """Where a job stands."""

    QUEUED = "QUEUED"  # waits for a worker (also while backing off before another attempt)
    RUNNING = "RUNNING"  # a worker holds the lease
    COMPUTED = "COMPUTED"  # the result lies in the spool; final where no destination is configured
    DELIVERING = "DELIVERING"  # being sent, or waiting for the next attempt to send
    DELIVERED = "DELIVERED"  # every instance was answered with success by every destination
    COMMITTED = "COMMITTED"  # and every destination that was asked has committed itself to keep them (PS3.4 annex J)
    NEEDS_REVIEW = "NEEDS_REVIEW"
    REJECTED = "REJECTED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED, State.FAILED}),
    State.RUNNING: frozenset(
        {State.QUEUED, State.COMPUTED, State.NEEDS_REVIEW, State.REJECTED, State.FAILED, State.CANCELLED}
    ),
    State.COMPUTED: frozenset({State.DELIVERING, State.QUEUED}),
    State.DELIVERING: frozenset({State.DELIVERED, State.FAILED, State.CANCELLED}),
    State.DELIVERED: frozenset({State.DELIVERING, State.QUEUED, State.COMMITTED, State.FAILED}),
    State.COMMITTED: frozenset({State.DELIVERING, State.QUEUED}),
    State.NEEDS_REVIEW: frozenset({State.QUEUED, State.CANCELLED}),
    State.REJECTED: frozenset({State.QUEUED}),
    State.FAILED: frozenset({State.QUEUED, State.DELIVERING, State.COMMITTED, State.CANCELLED}),
    State.CANCELLED: frozenset({State.QUEUED}),
}

STATE_OF_OUTCOME: dict[Outcome, State] = {
    Outcome.FAILED: State.FAILED,
    Outcome.NEEDS_REVIEW: State.NEEDS_REVIEW,
    Outcome.REJECTED: State.REJECTED,
}


class Stage(Enum):
    """What a running job is doing; the order is the order of the pipeline."""

    READ = "read"
    CHOOSE = "choose"
    PREPROCESS = "preprocess"
    INFER = "infer"
    COMPOSE = "compose"
    WRITE = "write"
    DELIVER = "deliver"


class Kind(Enum):
    """What a job can give. The value names the folder of the result and the kind of a delivery."""

    SD = "sd"  # the signal added to the pre-contrast image: what the standard dose would have shown
    SD_PLUS = "sd_plus"  # the signal added to the low-dose image
    SUBTRACTION = "subtraction"  # the signal alone, as MR images: SD minus pre-contrast
    PARAMETRIC_MAP = "parametric_map"  # the signal alone, as floating-point numbers
    SEGMENTATION = "segmentation"  # where the signal exceeds a threshold
    STRUCTURED_REPORT = "structured_report"  # acquisition values, quality figures, model
    PRESENTATION_STATE = "presentation_state"  # says over each MR series that it is synthetic


@dataclass(frozen=True)
class JobOptions:
    """What the sender or an operator asked for; part of the identity of a job."""

    engine: str = "network"  # "network" or "linear"
    pre_series_uid: str | None = None  # SeriesInstanceUID named by the caller: overrides the choice of series
    low_series_uid: str | None = None
    destinations: tuple[str, ...] = ()  # names from the site file; empty: result is only kept for download


@dataclass(frozen=True)
class Job:
    """One row of the ledger."""

    id: str  # uuid4 hex
    study_uid: str
    state: State
    options: JobOptions
    input_hash: str  # SHA-256 over the sorted SOPInstanceUIDs and their content digests
    attempt: int  # grows with every claim and re-send; what an older attempt brings is refused
    created_at: datetime  # UTC, timezone-aware
    updated_at: datetime
    stage: Stage | None = None
    progress: float = 0.0  # 0..1 of computing the job; from the first delivery on, how much of everything is sent
    reason: Reason | None = None
    detail: str = ""
    source: str = ""  # "dimse:CALLING_AE" or "rest"
    report: dict[str, Any] = field(default_factory=dict)  # what `lowgad run` writes as report.json
    tries: int = 0  # claims since a person last asked for it: what `max_attempts` limits
    due_at: datetime | None = None  # backing off: not before this moment
    worker: str = ""  # who holds, or last held, the lease
    superseded_by: str | None = None  # the job that was made when more of the study had arrived
