"""Jobs over REST: list, read, follow, download, and what an operator can ask for.

Hides paging and the streaming of a result. Must never change anything on GET.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from celery import Celery
from fastapi import APIRouter, Body, HTTPException, Query, Request
from fastapi.openapi.models import Example
from fastapi.responses import StreamingResponse
from zipstream import ZipStream

from service.core import actor
from service.core.job import Job, State
from service.core.ledger import Ledger
from service.core.spool import Spool
from service.intake import Intake
from service.web import problems
from service.web.api.schemas import JobDetails, JobOut, JobPage, NamedSeries, Responses, Step
from service.web.operations import Action, UnknownJobError, act, address_of, rerun_with_series

MAX_PAGE = 500
NAMED_EXAMPLE: dict[str, Example] = {
    "named": {"value": {"pre_series_uid": "1.2.840.99.4", "low_series_uid": "1.2.840.99.9"}}
}


def jobs(ledger: Ledger, spool: Spool) -> APIRouter:
    """What can be read of jobs."""
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
        return StreamingResponse(_archive(folder), media_type="application/zip", headers=headers)

    return router


def actions(ledger: Ledger, queue: Celery, intake: Intake) -> APIRouter:
    """What can be asked for."""
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
            return JobOut.of(rerun_with_series(ledger, queue, intake, job_id, **series, actor=_client(request)))
        return JobOut.of(act(ledger, queue, job_id, Action.RERUN, _client(request)))

    @router.post("/{job_id}/resend", status_code=202, summary="Send the result again; after a failure, what is missing")
    def resend(request: Request, job_id: str) -> JobOut:
        return JobOut.of(act(ledger, queue, job_id, Action.RESEND, _client(request)))

    @router.post("/{job_id}/cancel", status_code=202, summary="Stop a job; a worker notices within seconds")
    def cancel(request: Request, job_id: str) -> JobOut:
        return JobOut.of(act(ledger, queue, job_id, Action.CANCEL, _client(request)))

    return router


def _client(request: Request) -> str:
    return actor.client(address_of(request))


def _archive(folder: Path) -> Iterator[bytes]:
    """A zip archive of the folder, made while it is sent; nothing is compressed and nothing is written to disk."""
    archive = ZipStream()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        archive.add_path(path, path.relative_to(folder).as_posix())
    return iter(archive)
