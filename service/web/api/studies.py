"""Uploads of studies: the one door of REST through which images come in.

Hides streaming to disk and the form fields beside the files. Must never hold an upload in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from service.core.errors import Permanent, Reason
from service.core.job import JobOptions
from service.core.ledger import Ledger
from service.core.settings import Settings
from service.core.spool import Spool
from service.intake import Intake
from service.web import problems, uploads
from service.web.api.schemas import PREFIX, JobOut, Responses, UploadForm

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


def studies(settings: Settings, ledger: Ledger, spool: Spool, intake: Intake) -> APIRouter:
    """The upload."""
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
