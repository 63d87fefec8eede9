"""Whether this process lives and can take studies in, and what every reason means.

Hides which probes make it not ready and which only degrade it. The probes are those of `lowgad doctor`.
"""

from __future__ import annotations

from celery import Celery
from fastapi import APIRouter, Response

from service import probes
from service.core.ledger import Ledger
from service.core.spool import Spool
from service.web import problems
from service.web.api.schemas import Check, Named, Readiness, Responses


def health(ledger: Ledger, spool: Spool, queue: Celery) -> APIRouter:
    """Liveness, readiness, and the names of all reasons."""
    router = APIRouter()
    looks = [
        probes.Probe("database", lambda: probes.database(ledger)),
        probes.Probe("spool", lambda: probes.writable(spool)),
        probes.Probe("disk", lambda: probes.disk(spool)),
        probes.Probe("broker", lambda: probes.broker(queue)),
    ]
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
        checks = {found.name: Check(ok=found.ok, detail=found.detail) for found in probes.examine(looks)}
        if not all(checks[name].ok for name in ("database", "spool", "disk")):
            response.status_code = 503
            return Readiness(status="not_ready", checks=checks)
        return Readiness(status="ready" if checks["broker"].ok else "degraded", checks=checks)

    @router.get("/problems", summary="Every reason that a problem or a job may name", tags=["problems"])
    def all_reasons() -> list[Named]:
        return [
            Named(reason=name, outcome=outcome, text=text) for name, (outcome, text) in problems.explained().items()
        ]

    return router
