"""What an operator can do to a job, the same for REST and dashboard.

Hides which states allow which action, and that a changed state still needs a message in a queue. Must never act twice
on one click: every action is a compare-and-set in the ledger, and the one that comes too late is told so.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from celery import Celery
from starlette.requests import HTTPConnection

from service.core.job import TRANSITIONS, Job, State
from service.core.ledger import Ledger
from service.core.queue import enqueue
from service.intake import Intake


def address_of(request: HTTPConnection) -> str:
    """The network address that a request came from; empty where it is not known."""
    return request.client.host if request.client else ""


class Action(Enum):
    """What can be asked for. The value is the word in URLs."""

    RERUN = "rerun"
    RESEND = "resend"
    CANCEL = "cancel"


class UnknownJobError(LookupError):
    """No job has this id."""


class NotPossibleError(Exception):
    """The job's state, or what it has to send, does not allow the action. The message is for the operator."""


def possible(job: Job, *, has_deliveries: bool) -> frozenset[Action]:
    """The actions that make sense now."""
    following = TRANSITIONS[job.state]
    actions = {Action.CANCEL} if State.CANCELLED in following else set()
    if State.QUEUED in following and job.state is not State.RUNNING:
        actions.add(Action.RERUN)
    if State.DELIVERING in following and has_deliveries:
        actions.add(Action.RESEND)
    return frozenset(actions)


def act(ledger: Ledger, queue: Celery, job_id: str, action: Action, actor: str) -> Job:
    """Do it, and wake a worker.

    Raises:
        UnknownJobError: no such job.
        NotPossibleError: the state does not allow it (any more).
    """
    job = ledger.jobs.get(job_id)
    if job is None:
        raise UnknownJobError(job_id)
    changed = _change(ledger, job_id, action, actor)
    if changed is None:
        raise NotPossibleError(_why_not(ledger.jobs.get(job_id) or job, action))
    if changed.state in {State.QUEUED, State.DELIVERING}:
        enqueue(queue, ledger, changed)
    return changed


def rerun_with_series(
    ledger: Ledger,
    queue: Celery,
    intake: Intake,
    job_id: str,
    *,
    pre_series_uid: str | None,
    low_series_uid: str | None,
    actor: str,
) -> Job:
    """Compute a study again from the series that a person names: a job of its own, new or run again.

    Raises:
        UnknownJobError: no such job.
        NotPossibleError: the job with these series is under way.
    """
    job = ledger.jobs.get(job_id)
    if job is None:
        raise UnknownJobError(job_id)
    options = replace(job.options, pre_series_uid=pre_series_uid, low_series_uid=low_series_uid)
    found, has_started = intake.start(job.study_uid, options, job.source, actor)
    if has_started:
        return found
    try:
        return act(ledger, queue, found.id, Action.RERUN, actor)
    except NotPossibleError as error:
        raise NotPossibleError(f"Job {found.id} is made from these series. {error}") from None


def _change(ledger: Ledger, job_id: str, action: Action, actor: str) -> Job | None:
    match action:
        case Action.RERUN:
            return ledger.jobs.rerun(job_id, actor)
        case Action.RESEND:
            return ledger.deliveries.resend(job_id, actor)
        case Action.CANCEL:
            return ledger.jobs.cancel(job_id, actor)


def _why_not(job: Job, action: Action) -> str:
    if action is Action.RESEND and State.DELIVERING in TRANSITIONS[job.state]:
        return "The job has nothing to send: no destination was configured when it ran, or it never had a result."
    return f"The state {job.state.value} does not allow the action {action.value}."
