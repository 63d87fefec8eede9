"""Errors of the HTTP interface: every one is `application/problem+json` (RFC 9457) with a machine-readable `reason`.

Hides how exceptions become answers, and that a person with a browser gets a page instead. Must never show a value that
a client sent or a trace: field names, reasons and sentences written by us only.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.core.errors import LowgadError, Reason
from service.core.ledger import LedgerError
from service.web.dashboard.views import error_page
from service.web.operations import NotPossibleError, UnknownJobError

MEDIA_TYPE = "application/problem+json"
STATUS_OF_REASON = {
    Reason.INSTANCE_CONFLICT: HTTPStatus.CONFLICT,
    Reason.UPLOAD_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Reason.ARCHIVE_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Reason.STORAGE_FULL: HTTPStatus.INSUFFICIENT_STORAGE,
}
CONSTANT: dict[type[Exception], tuple[int, str, str]] = {
    UnknownJobError: (404, "NOT_FOUND", "There is no such job."),
    LedgerError: (503, "DATABASE_UNAVAILABLE", "The database does not answer. Try again."),
    ClientDisconnect: (400, "BAD_REQUEST", "The client went away before the end of the request."),
    Exception: (500, Reason.INTERNAL_ERROR.name, "An unexpected error; the log has the trace."),
}


# Of requests that end without a job: name, status, and what whoever asked should read.
HTTP_NAMES = {
    "BAD_REQUEST": "The request cannot be read; the detail says what is wrong with it.",
    "INVALID_REQUEST": "A field of the request is missing, unknown or has a value that cannot be meant.",
    "NOT_FOUND": "There is no such page, job or result.",
    "METHOD_NOT_ALLOWED": "This address does not take this kind of request.",
    "CONFLICT": "The state of the job does not allow this now.",
    "UNSUPPORTED_MEDIA_TYPE": "An upload is multipart/form-data; the detail says what came.",
    "ANOTHER_SITE": "A page of another site asked a browser to act here. Only pages of lowgad may.",
    "DATABASE_UNAVAILABLE": "The database does not answer. Try again.",
}


class Problem(BaseModel):
    """The body of every error."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "/problems#TWO_PATIENTS",
                    "title": Reason.TWO_PATIENTS.text,
                    "status": 422,
                    "reason": Reason.TWO_PATIENTS.name,
                    "detail": "2 patients in 320 files",
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    reason: str
    detail: str


def problem(status: int, reason: str, title: str, detail: str = "") -> Problem:
    """A problem; `type` leads to the list of all reasons."""
    return Problem(type=f"/problems#{reason}", title=title, status=status, reason=reason, detail=detail or title)


def answer(found: Problem) -> Response:
    """The problem as a client reads it."""
    return JSONResponse(found.model_dump(), status_code=found.status, media_type=MEDIA_TYPE)


def explained() -> dict[str, tuple[str | None, str]]:
    """Every name that `reason` of a problem or a job may have: the outcome of a job with it, and what it means."""
    of_jobs = {reason.name: (reason.outcome.name, reason.text) for reason in Reason}
    return of_jobs | {name: (None, text) for name, text in HTTP_NAMES.items()}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of an operation that may end in these statuses."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def install(app: FastAPI) -> None:
    """Answer every error of this application with a problem. The trace of an unexpected one goes to the log."""
    kinds: list[type[Exception]] = [HTTPException, RequestValidationError, LowgadError, NotPossibleError, *CONSTANT]
    for kind in kinds:
        app.add_exception_handler(kind, _on_error)


def _on_error(request: Request, error: Exception) -> Response:
    found = _describe(error)
    wants_page = not request.url.path.startswith("/api/") and "text/html" in request.headers.get("accept", "")
    if wants_page:
        response: Response = HTMLResponse(error_page(found.title, found.detail), status_code=found.status)
    else:
        response = answer(found)
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


def _describe(error: Exception) -> Problem:
    match error:
        case HTTPException():
            status = HTTPStatus(error.status_code)
            return problem(status, status.name, status.phrase, error.detail)
        case RequestValidationError():
            return problem(422, "INVALID_REQUEST", "The request is not valid.", _explain(error.errors()))
        case LowgadError(reason=reason, detail=detail):
            status = STATUS_OF_REASON.get(reason, HTTPStatus.UNPROCESSABLE_ENTITY)
            return problem(status, reason.name, reason.text, detail)
        case NotPossibleError():
            return problem(409, "CONFLICT", "The state of the job does not allow this.", str(error))
    return next(problem(*constant) for kind, constant in CONSTANT.items() if isinstance(error, kind))


def _explain(errors: Sequence[Any]) -> str:
    return "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in errors)
