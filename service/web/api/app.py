"""The HTTP interface: REST under /api/v1, health, and the dashboard.

Hides HTTP: status codes, paging, streaming and the shapes of JSON. Errors are RFC 9457 problems (`web.problems`).
Must never put an identifier of a patient or a study into a URL, which every proxy logs, and must never decode pixels.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from celery import Celery
from fastapi import FastAPI

from service.core.ledger import Ledger
from service.core.settings import Settings
from service.core.spool import Spool
from service.intake import Intake
from service.web import problems
from service.web.api.health import health
from service.web.api.jobs import actions, jobs
from service.web.api.schemas import PREFIX
from service.web.api.studies import studies
from service.web.dashboard import views
from service.web.guard import BrowserGuard


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
    app.include_router(studies(settings, ledger, spool, intake), prefix=PREFIX, tags=["studies"])
    app.include_router(jobs(ledger, spool), prefix=PREFIX, tags=["jobs"])
    app.include_router(actions(ledger, queue, intake), prefix=PREFIX, tags=["jobs"])
    app.include_router(health(ledger, spool, queue), tags=["health"])
    app.include_router(views.make_router(ledger, spool, queue))
    app.mount("/static", views.static_files())
    problems.install(app)
    app.add_middleware(BrowserGuard)
    return app
