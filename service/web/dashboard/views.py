"""The operator's pages, made on the server from the ledger.

Hides presentation: words, order and shape of what the ledger knows. Every page has a part that updates by itself: the
same template, served alone as a fragment, which a small script fetches again and again; without scripts the page
reloads. Must never show patient data, never need anything from another host, and never change anything on GET.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from celery import Celery
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.staticfiles import StaticFiles

from service.core import actor
from service.core.job import Stage, State
from service.core.ledger import CommitmentStatus, Delivery, DeliveryStatus, Ledger
from service.core.spool import Spool
from service.web.operations import Action, UnknownJobError, act, address_of, possible

PAGE_SIZE = 50
BANNER = "Research use. Trained on simulated data. Not a medical device."
WORDS = {
    State.QUEUED: "Queued",
    State.RUNNING: "Running",
    State.COMPUTED: "Computed",
    State.DELIVERING: "Delivering",
    State.DELIVERED: "Delivered",
    State.COMMITTED: "Committed",
    State.NEEDS_REVIEW: "Needs review",
    State.REJECTED: "Rejected",
    State.FAILED: "Failed",
    State.CANCELLED: "Cancelled",
}
STAGE_WORDS = {
    Stage.READ: "Reading",
    Stage.CHOOSE: "Choosing series",
    Stage.PREPROCESS: "Preparing images",
    Stage.INFER: "Computing enhancement",
    Stage.COMPOSE: "Composing series",
    Stage.WRITE: "Writing DICOM",
    Stage.DELIVER: "Sending",
}
# How names in the report end, longest first.
UNITS = {
    "_mmol_per_kg": "mmol/kg",
    "_mm": "mm",
    "_ml": "ml",
    "_kg": "kg",
    "_rad": "rad",
    "_t": "T",
    "_s": "s",
    "_deg": "deg",
}
SHOWN_ELSEWHERE = {"results", "acquisition", "quality", "options"}
ACTION_WORDS = {Action.RERUN: "Re-run", Action.RESEND: "Re-send", Action.CANCEL: "Cancel"}


def make_router(ledger: Ledger, spool: Spool, queue: Celery) -> APIRouter:
    """All pages, fragments and buttons."""
    router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

    @router.get("/")
    def overview(state: State | None = None, before: str | None = None) -> str:
        query = _query({"state": state.value if state else None, "before": before})
        return _page("overview.html", f"/fragments/overview?{query}", _overview(ledger, state, before))

    @router.get("/fragments/overview")
    def overview_fragment(request: Request, state: State | None = None, before: str | None = None) -> Response:
        return _fragment(request, "overview.html", _overview(ledger, state, before))

    @router.get("/jobs/{job_id}")
    def job_page(job_id: str) -> str:
        return _page("job.html", f"/fragments/jobs/{job_id}", _job(ledger, spool, job_id))

    @router.get("/fragments/jobs/{job_id}")
    def job_fragment(request: Request, job_id: str) -> Response:
        return _fragment(request, "job.html", _job(ledger, spool, job_id))

    @router.post("/jobs/{job_id}/{action}")
    def press(request: Request, job_id: str, action: Action) -> Response:
        act(ledger, queue, job_id, action, actor=actor.operator(address_of(request)))
        return RedirectResponse(f"/jobs/{job_id}", status_code=303)

    return router


def static_files() -> StaticFiles:
    """Style sheet, script and icon."""
    return StaticFiles(packages=[("service.web.dashboard", "static")])


def error_page(title: str, detail: str) -> str:
    """What a browser shows instead of a problem document."""
    return _render("error.html", title=title, detail=detail)


def _overview(ledger: Ledger, state: State | None, before: str | None) -> dict[str, Any]:
    jobs = ledger.jobs.page(states=[state] if state else None, limit=PAGE_SIZE + 1, before=before)
    counts = ledger.jobs.counts()
    return {
        "counts": counts,
        "total": sum(counts.values()),
        "waiting": ledger.received.waiting(),
        "jobs": jobs[:PAGE_SIZE],
        "older": jobs[PAGE_SIZE - 1].id if len(jobs) > PAGE_SIZE else None,
        "state": state,
        "before": before,
    }


def _job(ledger: Ledger, spool: Spool, job_id: str) -> dict[str, Any]:
    job = ledger.jobs.get(job_id)
    if job is None:
        raise UnknownJobError(job_id)
    deliveries = ledger.deliveries.of_job(job_id)
    return {
        "job": job,
        "actions": [action for action in Action if action in possible(job, has_deliveries=bool(deliveries))],
        "has_result": spool.result_dir(job_id).is_dir(),
        "history": ledger.jobs.history(job_id),
        "deliveries": deliveries,
        "destinations": _per_destination(deliveries),
        "kept": _kept(deliveries),
        "inputs": Counter(instance.series_uid for instance in ledger.jobs.inputs(job_id)).most_common(),
        "acquisition": list(_acquisition(job.report)),
        "quality": list(_quality(job.report)),
        "results": list(_results(job.report)),
        "facts": list(_facts(job.report)),
    }


def _per_destination(deliveries: Iterable[Delivery]) -> list[tuple[str, Counter[DeliveryStatus]]]:
    """(destination, how many instances stand how), in the order of names."""
    counts: dict[str, Counter[DeliveryStatus]] = {}
    for delivery in deliveries:
        counts.setdefault(delivery.destination, Counter())[delivery.status] += 1
    return sorted(counts.items())


def _kept(deliveries: Iterable[Delivery]) -> dict[str, dict[str, int]]:
    """Of each destination: how many instances it has committed itself to, of how many it is asked about."""
    kept = {item.destination: {"committed": 0, "total": 0} for item in deliveries}
    for item in deliveries:
        kept[item.destination]["committed"] += item.commitment is CommitmentStatus.COMMITTED
        kept[item.destination]["total"] += item.commitment is not CommitmentStatus.NONE
    return {name: counts if counts["total"] else {} for name, counts in kept.items()}


def _acquisition(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(quantity, value, where it came from) of what the worker read from the headers."""
    for name, known in report.get("acquisition", {}).items():
        value, source = (known.get("value"), known.get("source", "")) if isinstance(known, dict) else (known, "")
        yield _words(name), _plain(value), str(source)


def _quality(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(check, value, verdict, what it means)."""
    for figure in report.get("quality", []):
        name, value, verdict = figure.get("name", ""), figure.get("value"), figure.get("verdict", "")
        unit = str(figure.get("unit", "1")).removeprefix("1")
        yield _words(name), f"{_plain(value)} {unit}".rstrip(), str(verdict), str(figure.get("reason", ""))


def _results(report: Mapping[str, Any]) -> Iterator[tuple[str, str, int, str]]:
    """(kind, description, how many instances, SeriesInstanceUID) of every series that was made."""
    for kind, series in report.get("results", {}).items():
        yield kind, series["description"], series["instances"], series["series_instance_uid"]


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Every other part of the report that is a table: engine, series, preparation, time per stage."""
    for section, content in report.items():
        if section not in SHOWN_ELSEWHERE and isinstance(content, dict):
            rows = [(_words(name), _plain(value)) for name, value in content.items()]
            if rows:
                yield _words(section), rows


def _words(name: str) -> str:
    """`dose_mmol_per_kg` as people write it: Dose (mmol/kg)."""
    unit = next((suffix for suffix in UNITS if name.endswith(suffix)), "")
    text = name.removesuffix(unit).replace("_", " ").strip()
    return f"{text[:1].upper()}{text[1:]}" + (f" ({UNITS[unit]})" if unit else "")


def _plain(value: Any) -> str:
    match value:
        case None:
            return "unknown"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(_plain(item) for item in value) or "none"
        case dict():
            return "; ".join(f"{_words(str(name))}: {_plain(item)}" for name, item in value.items())
        case _:
            return str(value)


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _query(values: Mapping[str, str | None]) -> str:
    return urlencode({name: value for name, value in values.items() if value is not None})


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("service.web.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["moment"] = _moment
    environment.filters["query"] = _query
    environment.filters["action"] = lambda action: ACTION_WORDS[action]
    environment.filters["state"] = lambda state: WORDS[state]
    environment.filters["stage"] = lambda stage: STAGE_WORDS[stage]
    environment.globals.update(banner=BANNER, states=list(State), State=State, Action=Action, Sent=DeliveryStatus)
    return environment


_ENVIRONMENT = _environment()


def _page(template: str, url: str, values: Mapping[str, Any]) -> str:
    """A whole page, whose script asks `url` for the part that changes."""
    part = _render(f"_{template}", **values)
    return _render(template, part=Markup(part), part_url=url, part_version=_version(part), **values)  # noqa: S704  rendered with autoescape


def _fragment(request: Request, template: str, values: Mapping[str, Any]) -> Response:
    """The part that changes; without content while it is as the browser already has it."""
    part = _render(f"_{template}", **values)
    headers = {"ETag": _version(part)}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return HTMLResponse(part, headers=headers)


def _version(part: str) -> str:
    return f'"{hashlib.sha256(part.encode()).hexdigest()[:32]}"'


def _render(template: str, **values: Any) -> str:
    return _ENVIRONMENT.get_template(template).render(values)
