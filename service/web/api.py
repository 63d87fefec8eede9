"""The HTTP interface: REST under /api/v1, health, and the dashboard.

Hides HTTP: status codes, paging, streaming and the shapes of JSON. Errors are RFC 9457 problems (`web.problems`).
Must never put an identifier of a patient or a study into a URL, which every proxy logs, and must never decode pixels.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from celery import Celery
from fastapi import APIRouter, Body, FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.models import Example
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.core import actor
from service.core.errors import Permanent, Reason
from service.core.job import Job, JobOptions, Kind, Stage, State
from service.core.ledger import Ledger, LedgerError, Transition
from service.core.queue import is_reachable
from service.core.settings import Settings
from service.core.spool import Spool
from service.intake import Intake
from service.web import problems, uploads
from service.web.dashboard import views
from service.web.guard import BrowserGuard
from service.web.operations import Action, UnknownJobError, act, rerun_with_series

Responses = dict[int | str, dict[str, Any]]

PREFIX = "/api/v1"
MAX_PAGE = 500
ZIP_CHUNK_BYTES = 1 << 18
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


UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["files"],
                "properties": {
                    "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    "engine": {"type": "string", "enum": ["network", "linear"]},
                    "pre_series_uid": {"type": "string", "description": "Series Instance UID"},
                    "low_series_uid": {"type": "string", "description": "Series Instance UID"},
                },
            },
            "example": {"files": ["study.zip"], "engine": "network"},
        }
    },
}


NAMED_EXAMPLE: dict[str, Example] = {
    "named": {"value": {"pre_series_uid": "1.2.840.99.4", "low_series_uid": "1.2.840.99.9"}}
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
    """One change of a job's state."""

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
        json_schema_extra={"examples": [{"status": "ready", "checks": {"database": {"ok": True, "detail": ""}}}]}
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
    outcome: str
    text: str


class _Application(FastAPI):
    """FastAPI knows no model for errors whose media type is not its own."""

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        schema["components"]["schemas"]["Problem"] = problems.Problem.model_json_schema()
        return schema


def create_app(settings: Settings, ledger: Ledger, spool: Spool, queue: Celery) -> FastAPI:
    """The application; `lowgad api` and `lowgad up` serve it with uvicorn."""
    app = _Application(
        title="lowgad",
        version=version("lowgad"),
        summary=views.BANNER,
        docs_url=None,  # both pages load scripts from other hosts
        redoc_url=None,
        openapi_url=f"{PREFIX}/openapi.json",
        responses=problems.documented(422, 500),
    )
    intake = Intake(settings, ledger, spool, queue)
    app.include_router(_studies(settings, ledger, spool, intake), prefix=PREFIX, tags=["studies"])
    app.include_router(_jobs(ledger, spool), prefix=PREFIX, tags=["jobs"])
    app.include_router(_actions(ledger, queue, intake), prefix=PREFIX, tags=["jobs"])
    app.include_router(_health(ledger, spool, queue), tags=["health"])
    app.include_router(views.make_router(ledger, spool, queue))
    app.mount("/static", views.static_files())
    problems.install(app)
    app.add_middleware(BrowserGuard)
    return app


def _studies(settings: Settings, ledger: Ledger, spool: Spool, intake: Intake) -> APIRouter:
    router = APIRouter()
    again: Responses = {200: {"model": JobOut, "description": "The job that the same upload made before"}}

    @router.post(
        "/studies",
        status_code=202,
        summary="Upload one study: DICOM files or a zip archive",
        responses=again | problems.documented(400, 409, 413, 415, 507),
        openapi_extra={"requestBody": UPLOAD_BODY},
    )
    async def upload(request: Request, response: Response) -> JobOut:
        if spool.is_low():
            raise Permanent(Reason.STORAGE_FULL, "free disk space is below the watermark")
        with spool.workspace() as folder:
            body = await _receive(request, folder, settings)
            options = _options(body.fields, settings)
            job, created = await run_in_threadpool(
                uploads.accept, body, folder, options, settings=settings, ledger=ledger, intake=intake
            )
        response.status_code = 202 if created else 200
        response.headers["Location"] = f"{PREFIX}/jobs/{job.id}"
        return JobOut.of(job)

    return router


def _options(fields: dict[str, str], settings: Settings) -> JobOptions:
    """What the form asks for.

    Raises:
        RequestValidationError: an unknown field, or a value that cannot be meant.
    """
    try:
        form = UploadForm.model_validate({name: value for name, value in fields.items() if value})
    except ValidationError as error:
        raise RequestValidationError([item | {"loc": ("body", *item["loc"])} for item in error.errors()]) from None
    return JobOptions(
        engine=form.engine or settings.engine,
        pre_series_uid=form.pre_series_uid,
        low_series_uid=form.low_series_uid,
        destinations=settings.default_destinations,
    )


async def _receive(request: Request, folder: Path, settings: Settings) -> uploads.Upload:
    """Write the body to disk as it comes."""
    try:
        receiver = uploads.MultipartReceiver(request.headers.get("content-type", ""), folder, settings)
    except ValueError as error:
        raise HTTPException(415, str(error)) from None
    try:
        async for chunk in request.stream():
            await run_in_threadpool(receiver.write, chunk)
        return receiver.finish()
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    finally:
        receiver.close()


def _jobs(ledger: Ledger, spool: Spool) -> APIRouter:
    router = APIRouter(prefix="/jobs")
    archive: Responses = {200: {"content": {"application/zip": {"example": "(zip archive)"}}}}

    def known(job_id: str) -> Job:
        if (job := ledger.jobs.get(job_id)) is None:
            raise UnknownJobError
        return job

    @router.get("", summary="List jobs, newest first", responses=problems.documented(404))
    def jobs(
        state: Annotated[list[State] | None, Query(description="Only these states; repeat for several")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
        before: Annotated[str | None, Query(description="`next` of the previous page")] = None,
    ) -> JobPage:
        found = ledger.jobs.page(states=state, limit=limit + 1, before=known(before).id if before else None)
        more = found[limit - 1].id if len(found) > limit else None
        return JobPage(jobs=[JobOut.of(job) for job in found[:limit]], next=more)

    @router.get("/{job_id}", summary="Read a job", responses=problems.documented(404))
    def job(job_id: str) -> JobDetails:
        found = known(job_id)
        return JobDetails.of(found)

    @router.get("/{job_id}/history", summary="What happened to a job, oldest first", responses=problems.documented(404))
    def history(job_id: str) -> list[Step]:
        return [Step.of(step) for step in ledger.jobs.history(known(job_id).id)]

    @router.get(
        "/{job_id}/result",
        summary="Download the derived series and the report as a zip archive",
        response_class=StreamingResponse,
        responses=archive | problems.documented(404),
    )
    def result(job_id: str) -> StreamingResponse:
        folder = spool.result_dir(known(job_id).id)
        if not folder.is_dir():
            raise HTTPException(404, "The job has no result (yet).")
        headers = {"Content-Disposition": f'attachment; filename="lowgad-{job_id}.zip"'}
        return StreamingResponse(_zip_stream(folder), media_type="application/zip", headers=headers)

    return router


def _actions(ledger: Ledger, queue: Celery, intake: Intake) -> APIRouter:
    router = APIRouter(prefix="/jobs", responses=problems.documented(404, 409))

    @router.post(
        "/{job_id}/rerun",
        status_code=202,
        summary="Compute again from the same input; with series named, in a job of its own over what has arrived",
    )
    def rerun(
        request: Request, job_id: str, named: Annotated[NamedSeries | None, Body(openapi_examples=NAMED_EXAMPLE)] = None
    ) -> JobOut:
        if named and (named.pre_series_uid or named.low_series_uid):
            series = named.model_dump()
            return JobOut.of(rerun_with_series(ledger, queue, intake, job_id, **series, actor=_actor(request)))
        return JobOut.of(act(ledger, queue, job_id, Action.RERUN, _actor(request)))

    @router.post("/{job_id}/resend", status_code=202, summary="Send the result again; after a failure, what is missing")
    def resend(request: Request, job_id: str) -> JobOut:
        return JobOut.of(act(ledger, queue, job_id, Action.RESEND, _actor(request)))

    @router.post("/{job_id}/cancel", status_code=202, summary="Stop a job; a worker notices within seconds")
    def cancel(request: Request, job_id: str) -> JobOut:
        return JobOut.of(act(ledger, queue, job_id, Action.CANCEL, _actor(request)))

    return router


def _actor(request: Request) -> str:
    return actor.client(request.client.host if request.client else "")


def _health(ledger: Ledger, spool: Spool, queue: Celery) -> APIRouter:
    router = APIRouter()
    alive: Responses = {200: {"content": {"application/json": {"example": {"status": "alive"}}}}}

    @router.get("/healthz", summary="The process is alive", responses=alive)
    def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @router.get(
        "/readyz",
        summary="Studies can be taken in; a broker that is down only degrades",
        responses={503: {"model": Readiness, "description": "Nothing can be taken in"}},
    )
    def readyz(response: Response) -> Readiness:
        vital = {"database": _check_database(ledger), "spool": _check_writable(spool), "disk": _check_disk(spool)}
        broker = Check(ok=is_reachable(queue), detail="")
        if not all(check.ok for check in vital.values()):
            response.status_code = 503
            return Readiness(status="not_ready", checks=vital | {"broker": broker})
        return Readiness(status="ready" if broker.ok else "degraded", checks=vital | {"broker": broker})

    @router.get("/problems", summary="Every reason that a problem or a job may name", tags=["problems"])
    def all_reasons() -> list[Named]:
        return [Named(reason=item.name, outcome=item.outcome.name, text=item.text) for item in Reason]

    return router


def _check_database(ledger: Ledger) -> Check:
    try:
        ledger.ping()
    except LedgerError as error:
        return Check(ok=False, detail=type(error).__name__)
    return Check(ok=True, detail="")


def _check_writable(spool: Spool) -> Check:
    try:
        with spool.workspace() as folder:
            (folder / "probe").write_bytes(b"probe")
    except OSError as error:
        return Check(ok=False, detail=type(error).__name__)
    return Check(ok=True, detail="")


def _check_disk(spool: Spool) -> Check:
    return Check(ok=not spool.is_low(), detail=f"{spool.free_bytes() >> 20} MiB free")


def _zip_stream(folder: Path) -> Iterator[bytes]:
    """A zip archive of the folder, made while it is sent; nothing is compressed and nothing is written to disk."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as source, archive.open(_member(path, folder), "w") as member:
                while chunk := source.read(ZIP_CHUNK_BYTES):
                    member.write(chunk)
                    yield sink.taken()
    yield sink.taken()


def _member(path: Path, folder: Path) -> zipfile.ZipInfo:
    return zipfile.ZipInfo.from_file(path, path.relative_to(folder).as_posix())


class _Sink(io.RawIOBase):
    """Where `zipfile` writes; what was written is taken away again and again."""

    def __init__(self) -> None:
        super().__init__()
        self._chunks: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._chunks.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        """What was written since the last call."""
        chunks, self._chunks = self._chunks, []
        return b"".join(chunks)
