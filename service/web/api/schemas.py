"""The shapes of JSON that the REST interface takes and gives, with the examples of its documentation.

Hides how a job of the ledger becomes JSON. Must never show patient data.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from service.core.errors import Reason
from service.core.job import Job, Kind, Stage, State
from service.core.ledger import Transition

PREFIX = "/api/v1"
Responses = dict[int | str, dict[str, Any]]
JOB_EXAMPLE: dict[str, Any] = {
    "id": "5f1c0c3e8f0e4d0c9d1b7a3f2e6c4b10",
    "study_uid": "2.25.140474831122862",
    "state": "RUNNING",
    "stage": "infer",
    "progress": 0.62,
    "reason": None,
    "reason_text": None,
    "detail": "",
    "engine": "network",
    "pre_series_uid": None,
    "low_series_uid": None,
    "destinations": ["pacs"],
    "attempt": 1,
    "source": "rest",
    "created_at": "2031-05-04T03:02:01Z",
    "updated_at": "2031-05-04T03:02:09Z",
    "due_at": None,
    "superseded_by": None,
}
STEP_EXAMPLE: dict[str, Any] = {
    "at": "2031-05-04T03:02:01Z",
    "from_state": "QUEUED",
    "to_state": "RUNNING",
    "actor": "worker:gpu1",
    "reason": None,
    "detail": "",
    "attempt": 1,
}


class NamedSeries(BaseModel):
    """The two series, where the caller knows better than headers say."""

    model_config = ConfigDict(extra="forbid")

    pre_series_uid: str | None = Field(default=None, pattern=r"^[0-9.]{1,64}$", description="Series Instance UID")
    low_series_uid: str | None = Field(default=None, pattern=r"^[0-9.]{1,64}$", description="Series Instance UID")


class UploadForm(NamedSeries):
    """The form fields beside the files."""

    engine: Literal["network", "linear"] | None = None


class JobOut(BaseModel):
    """A job: one computation over a fixed set of instances of one study."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"examples": [JOB_EXAMPLE]})

    id: str
    study_uid: str
    state: State
    stage: Stage | None
    progress: float = Field(ge=0, le=1)
    reason: str | None = Field(description="Name of the reason for which there is no result (yet)")
    reason_text: str | None = Field(description="What an operator should read")
    detail: str
    engine: str
    pre_series_uid: str | None
    low_series_uid: str | None
    destinations: tuple[str, ...]
    attempt: int
    source: str
    created_at: datetime
    updated_at: datetime
    due_at: datetime | None = Field(description="Backing off until then")
    superseded_by: str | None = Field(description="The job that was made when more of the study had arrived")

    @classmethod
    def of(cls, job: Job) -> Self:
        """The job of the ledger as JSON shows it."""
        return cls(
            **{name: getattr(job, name) for name in cls.model_fields if hasattr(job, name) and name != "reason"},
            **{name: getattr(job.options, name) for name in ("engine", "pre_series_uid", "low_series_uid")},
            destinations=job.options.destinations,
            reason=job.reason.name if job.reason else None,
            reason_text=job.reason.text if job.reason else None,
        )


class ResultOut(BaseModel):
    """One series that a job has made."""

    model_config = ConfigDict(extra="ignore")

    kind: Kind
    description: str = Field(description="SeriesDescription")
    sop_class_uid: str
    series_instance_uid: str
    instances: int


class JobDetails(JobOut):
    """A job with the worker's report: acquisition with provenance, quality checks, timings."""

    model_config = ConfigDict(json_schema_extra={"examples": [JOB_EXAMPLE | {"results": [], "report": {}}]})

    results: list[ResultOut] = Field(description="The series that it has made")
    report: dict[str, Any]

    @classmethod
    def of(cls, job: Job) -> Self:
        """The job of the ledger with its report."""
        results = [ResultOut(kind=Kind(kind), **series) for kind, series in job.report.get("results", {}).items()]
        return cls(**JobOut.of(job).model_dump(), results=results, report=job.report)


class JobPage(BaseModel):
    """Jobs, newest first. `next` is the value of `before` for the page after this one."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"jobs": [JOB_EXAMPLE], "next": None}]})

    jobs: list[JobOut]
    next: str | None


class Step(BaseModel):
    """One change of a job's state; with equal states, a delivery that failed and will be tried again."""

    model_config = ConfigDict(json_schema_extra={"examples": [STEP_EXAMPLE]})

    at: datetime
    from_state: State | None
    to_state: State
    actor: str
    reason: str | None
    detail: str
    attempt: int

    @classmethod
    def of(cls, step: Transition) -> Self:
        """The transition of the ledger as JSON shows it."""
        fields = {name: getattr(step, name) for name in cls.model_fields if name != "reason"}
        return cls(**fields, reason=step.reason.name if step.reason else None)


class Check(BaseModel):
    """One thing that readiness depends on."""

    ok: bool
    detail: str


class Readiness(BaseModel):
    """`ready`; `degraded` while studies are taken in but nothing is computed; `not_ready` while nothing is taken in."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"status": "ready", "checks": {"database": {"ok": True, "detail": "answers"}}}]}
    )

    status: Literal["ready", "degraded", "not_ready"]
    checks: dict[str, Check]


class Named(BaseModel):
    """A reason with what an operator should read."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"reason": Reason.NOT_MR.name, "outcome": "REJECTED", "text": Reason.NOT_MR.text}]
        }
    )

    reason: str
    outcome: str | None = Field(description="How a job with this reason ends; null where only a request ends so")
    text: str
