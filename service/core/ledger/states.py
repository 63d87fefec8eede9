"""The one way in which a job changes: a compare-and-set on its row, and the line of history that it leaves.

Hides the row of a job. Every function works inside the transaction of its caller, one of the books. A state changes by
one `UPDATE ... WHERE state IN (...)`, so of two writers one wins and the other is told. A worker proves by its attempt
number that it still owns a job. Whoever changes more than one row about a job holds the job's own row first (`hold`),
so no two wait for each other. Must never change a state in a way that the table of transitions does not have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, select, update

from service.core.errors import Reason
from service.core.job import TRANSITIONS, Job, JobOptions, Stage, State
from service.core.ledger import schema

AFRESH: dict[str, Any] = {  # a person asked again: nothing of what was tried before counts
    "tries": 0,
    "progress": 0.0,
    "due_at": None,
    "enqueued_at": None,
    "lease_until": None,
    "reason": None,
    "detail": "",
}


@dataclass(frozen=True)
class Transition:
    """One line of a job's history. `from_state` is None for its creation.

    The two states are the same where something happened that changed no state: sending failed and is postponed.
    """

    at: datetime
    from_state: State | None
    to_state: State
    actor: str
    reason: Reason | None
    detail: str
    attempt: int


def swap(
    connection: Connection,
    job_id: str,
    from_states: Collection[State],
    to: State,
    values: dict[str, Any],
    *,
    actor: str,
    at: datetime,
    attempt: int | None = None,
    only_if: ColumnElement[bool] | None = None,
) -> Row[Any] | None:
    """Change the state, if it is one of `from_states` and, where given, the attempt is still `attempt`.

    Returns:
        The job's row as it is now, or None when somebody else was faster.

    Raises:
        ValueError: the table of transitions forbids one of the changes (a mistake of the caller).
    """
    if forbidden := [state.value for state in from_states if to not in TRANSITIONS[state]]:
        raise ValueError(f"no transition from {', '.join(forbidden)} to {to.value}")
    table = schema.jobs
    change = (
        update(table)
        .where(table.c.id == job_id, table.c.state.in_([state.value for state in from_states]))
        .values(values | {"previous_state": table.c.state, "state": to.value, "updated_at": at})
        .returning(table)
    )
    change = change if attempt is None else change.where(table.c.attempt == attempt)
    change = change if only_if is None else change.where(only_if)
    row = connection.execute(change).one_or_none()
    if row is not None:
        record(connection, job_of(row), State(row.previous_state), actor=actor, at=at)
    return row


def touch(
    connection: Connection,
    job_id: str,
    state: State,
    values: dict[str, Any],
    only_if: ColumnElement[bool],
    *,
    at: datetime,
) -> Job | None:
    """Change a job without changing its state; None when it is not, or no longer, as the caller thinks."""
    table = schema.jobs
    change = update(table).where(table.c.id == job_id, table.c.state == state.value, only_if)
    row = connection.execute(change.values(values | {"updated_at": at}).returning(table)).one_or_none()
    return None if row is None else job_of(row)


def record(connection: Connection, job: Job, previous: State | None, *, actor: str, at: datetime) -> None:
    """Write a line of history: how the job stands now, and in which state it was before."""
    row = {
        "job_id": job.id,
        "at": at,
        "from_state": previous.value if previous else None,
        "to_state": job.state.value,
        "actor": actor,
        "reason": job.reason.name if job.reason else None,
        "detail": job.detail,
        "attempt": job.attempt,
    }
    connection.execute(schema.transitions.insert().values(row))


def hold(connection: Connection, job_id: str) -> Row[Any] | None:
    """The job, changed by nobody else until the end of the transaction. SQLite has one writer anyway."""
    return connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id).with_for_update()).one_or_none()


def sources_of(to: State) -> list[State]:
    """The states from which a job may come to this one."""
    return [state for state, following in TRANSITIONS.items() if to in following]


def leased(worker: str, until: datetime) -> dict[str, Any]:
    """What a claim changes: a new attempt, one more try, and a lease."""
    table = schema.jobs
    attempt, tries = table.c.attempt + 1, table.c.tries + 1
    return {"attempt": attempt, "tries": tries, "worker": worker, "lease_until": until, "due_at": None}


def is_free(at: datetime) -> ColumnElement[bool]:
    """Whether nobody holds a lease on the job."""
    return schema.jobs.c.lease_until.is_(None) | (schema.jobs.c.lease_until <= at)


def later(at: datetime, seconds: float) -> datetime:
    """The moment so many seconds after another."""
    return at + timedelta(seconds=seconds)


def hash_of(options: JobOptions) -> str:
    """The same for the same options."""
    return hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode()).hexdigest()


def row_of(job: Job) -> dict[str, Any]:
    """A new job as it is stored."""
    return {
        "id": job.id,
        "study_uid": job.study_uid,
        "state": job.state.value,
        "options": asdict(job.options),
        "options_hash": hash_of(job.options),
        "input_hash": job.input_hash,
        "attempt": job.attempt,
        "tries": job.tries,
        "created_at": job.created_at,
        "updated_at": job.updated_at,
        "progress": job.progress,
        "detail": job.detail,
        "source": job.source,
        "report": job.report,
    }


def job_of(row: Row[Any]) -> Job:
    """A stored job."""
    options = dict(row.options)
    options["destinations"] = tuple(options["destinations"])
    return Job(
        id=row.id,
        study_uid=row.study_uid,
        state=State(row.state),
        options=JobOptions(**options),
        input_hash=row.input_hash,
        attempt=row.attempt,
        created_at=row.created_at,
        updated_at=row.updated_at,
        stage=Stage(row.stage) if row.stage else None,
        progress=row.progress,
        reason=Reason[row.reason] if row.reason else None,
        detail=row.detail,
        source=row.source,
        report=row.report,
        tries=row.tries,
        due_at=row.due_at,
        worker=row.worker or "",
        superseded_by=row.superseded_by,
    )


def transition_of(row: Row[Any]) -> Transition:
    """A stored line of history."""
    return Transition(
        at=row.at,
        from_state=State(row.from_state) if row.from_state else None,
        to_state=State(row.to_state),
        actor=row.actor,
        reason=Reason[row.reason] if row.reason else None,
        detail=row.detail,
        attempt=row.attempt,
    )
