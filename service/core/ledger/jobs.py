"""The book of jobs: which exist, where each stands, what happened to it, and what the sweep has to look after.

Guarantees: the same input and options give one job, whoever asks at the same moment; of several workers one gets a job;
what an attempt brings that was given up is refused; a result and what is to be sent of it are noted in one transaction;
every change of a state leaves its line of history. Jobs of one study are made one after the other; whoever changes more
than one row about a job holds the job's own row first. Must never hold pixels or patient data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Row, and_, func, or_, select, update

from service.core.actor import LEDGER
from service.core.errors import Reason
from service.core.job import Job, JobOptions, Stage, State
from service.core.ledger import schema
from service.core.ledger.database import Database, insert_new, one_at_a_time
from service.core.ledger.deliveries import Delivery, drop, plan
from service.core.ledger.received import Instance, instance_of, stop_waiting
from service.core.ledger.states import (
    AFRESH,
    Transition,
    hash_of,
    is_free,
    job_of,
    later,
    leased,
    record,
    row_of,
    sources_of,
    swap,
    transition_of,
)

MAY_BE_DUE = (State.QUEUED, State.DELIVERING, State.DELIVERED)
NOT_COMPUTED = (State.QUEUED, State.RUNNING, State.NEEDS_REVIEW)
AFTER_A_RUN = (
    State.COMPUTED,
    State.DELIVERED,
    State.COMMITTED,
    State.NEEDS_REVIEW,
    State.REJECTED,
    State.FAILED,
    State.CANCELLED,
)


class Jobs:
    """See the head of this module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- looking ------------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job | None:
        """The job of that id."""
        rows = self._database.read(select(schema.jobs).where(schema.jobs.c.id == job_id))
        return job_of(rows[0]) if rows else None

    def page(
        self,
        states: Collection[State] | None = None,
        limit: int = 100,
        before: str | None = None,
        study_uid: str | None = None,
    ) -> list[Job]:
        """Jobs, newest first. `before` is the id of the last job of the previous page."""
        table = schema.jobs
        query = select(table).order_by(table.c.created_at.desc(), table.c.id.desc()).limit(limit)
        if states is not None:
            query = query.where(table.c.state.in_([state.value for state in states]))
        if study_uid is not None:
            query = query.where(table.c.study_uid == study_uid)
        if before is not None and (last := self.get(before)):
            older = and_(table.c.created_at == last.created_at, table.c.id < last.id)
            query = query.where(or_(table.c.created_at < last.created_at, older))
        return [job_of(row) for row in self._database.read(query)]

    def inputs(self, job_id: str) -> list[Instance]:
        """The instances a job was made for."""
        table, chosen = schema.instances, schema.job_inputs
        query = (
            select(table)
            .join(chosen, chosen.c.sop_instance_uid == table.c.sop_instance_uid)
            .where(chosen.c.job_id == job_id)
            .order_by(table.c.sop_instance_uid)
        )
        return [instance_of(row) for row in self._database.read(query)]

    def history(self, job_id: str) -> list[Transition]:
        """Everything that happened to a job, oldest first."""
        table = schema.transitions
        query = select(table).where(table.c.job_id == job_id).order_by(table.c.id)
        return [transition_of(row) for row in self._database.read(query)]

    def counts(self) -> dict[State, int]:
        """How many jobs stand in each state; every state is present."""
        table = schema.jobs
        rows = self._database.read(select(table.c.state, func.count().label("total")).group_by(table.c.state))
        return dict.fromkeys(State, 0) | {State(row.state): row.total for row in rows}

    # --- making and changing ------------------------------------------------------------------------------------------

    def create(
        self,
        study_uid: str,
        instances: Sequence[Instance],
        options: JobOptions,
        source: str,
        considered: Sequence[Instance] = (),
        *,
        actor: str = "",
    ) -> tuple[Job, bool]:
        """A job over exactly these instances; the job that already exists for the same input and options, if any.

        A study only grows, so of two jobs with the same options the one that was made from more of it is wanted: the
        other is marked as superseded, and stopped where it was not computed yet. A caller who looked at the study
        before somebody else did is given the other's job. Callers at the same moment are served one after the other.

        Args:
            study_uid: the study they belong to.
            instances: the input.
            options: what was asked for.
            source: where the study came from.
            considered: instances of the study that were looked at and are not input; they stop waiting, too.
            actor: who asks, for the history; unset: the source.

        Returns:
            The job, and whether it has to be computed because of this call.
        """
        looked_at = {item.sop_instance_uid for item in [*instances, *considered]}
        fresh = _new_job(study_uid, instances, options, source, self._database.now())
        with self._database.begin() as connection:
            one_at_a_time(connection, study_uid)
            rivals = _jobs_alike(connection, study_uid, options)
            newest = max(rivals, key=lambda row: row.considered, default=None)
            if newest is not None and newest.considered > len(looked_at):
                job, created = job_of(newest), False
            else:
                job, created = _wanted(connection, fresh, instances, len(looked_at), rivals, actor=actor or source)
            stop_waiting(connection, job.id, sorted(looked_at))
        return job, created

    def move(
        self,
        job_id: str,
        from_states: Collection[State],
        to: State,
        *,
        actor: str,
        reason: Reason | None = None,
        detail: str = "",
        attempt: int | None = None,
        report: dict[str, Any] | None = None,
        due_at: datetime | None = None,
        progress: float | None = None,
    ) -> Job | None:
        """Change the state, if it is one of `from_states` and, where given, the attempt is still `attempt`.

        A job moved to QUEUED with `due_at` is enqueued by the sweep at that moment; its tries go on counting.

        Returns:
            The job as it is now, or None when somebody else was faster.

        Raises:
            ValueError: the table of transitions forbids one of the changes (a mistake of the caller).
        """
        values: dict[str, Any] = {"reason": reason.name if reason else None, "detail": detail, "due_at": due_at}
        values |= {"enqueued_at": None, "lease_until": None}
        given = {"report": report, "progress": 0.0 if to is State.QUEUED else progress}
        values |= {name: value for name, value in given.items() if value is not None}
        with self._database.begin() as connection:
            now = self._database.now()
            row = swap(connection, job_id, from_states, to, values, actor=actor, at=now, attempt=attempt)
        return None if row is None else job_of(row)

    def claim(self, job_id: str, worker: str, lease_seconds: float) -> Job | None:
        """Take a QUEUED job to run it; None when it is not there to be taken (a second message is a no-op).

        What an earlier run made is no longer to be sent, whatever comes of this one.
        """
        now = self._database.now()
        values = leased(worker, later(now, lease_seconds))
        values |= {"stage": None, "progress": 0.0, "reason": None, "detail": ""}
        with self._database.begin() as connection:
            row = swap(connection, job_id, [State.QUEUED], State.RUNNING, values, actor=worker, at=now)
            if row is None:
                return None
            drop(connection, job_id)
        return job_of(row)

    def heartbeat(
        self, job: Job, stage: Stage | None = None, progress: float | None = None, *, lease_seconds: float
    ) -> bool:
        """Extend the lease of a job that is still as it was claimed; a lease that was given back is not taken again.

        Args:
            job: as it was claimed.
            stage: what is being done.
            progress: 0..1 of the whole.
            lease_seconds: how long the lease lasts from now.

        Returns:
            False when the job is no longer ours: stop, and throw the work away.
        """
        values: dict[str, Any] = {"lease_until": later(self._database.now(), lease_seconds)}
        values |= {"stage": stage.value} if stage else {}
        values |= {"progress": min(max(progress, 0.0), 1.0)} if progress is not None else {}
        table = schema.jobs
        ours = and_(table.c.id == job.id, table.c.attempt == job.attempt, table.c.state == job.state.value)
        change = update(table).where(ours, table.c.lease_until.is_not(None))
        with self._database.begin() as connection:
            return bool(connection.execute(change.values(values)).rowcount)

    def finish(
        self, job_id: str, attempt: int, *, actor: str, report: dict[str, Any], deliveries: Iterable[Delivery] = ()
    ) -> Job | None:
        """The result is published: RUNNING -> COMPUTED, and on to DELIVERING where there is something to deliver.

        One transaction, so no result can be computed and then forgotten. None when the attempt is no longer ours.
        """
        now = self._database.now()
        values = {"report": report, "progress": 1.0, "lease_until": None, "tries": 0, "enqueued_at": None}
        with self._database.begin() as connection:
            before, to = [State.RUNNING], State.COMPUTED
            row = swap(connection, job_id, before, to, values, actor=actor, at=now, attempt=attempt)
            if row and plan(connection, job_id, deliveries, at=now):
                row = swap(connection, job_id, [State.COMPUTED], State.DELIVERING, {}, actor=actor, at=now)
        return None if row is None else job_of(row)

    def cancel(self, job_id: str, actor: str, detail: str = "") -> Job | None:
        """Stop a job wherever it can be stopped; a worker notices at its next heartbeat."""
        return self.move(job_id, sources_of(State.CANCELLED), State.CANCELLED, actor=actor, detail=detail)

    def rerun(self, job_id: str, actor: str) -> Job | None:
        """Compute again from the same input, with fresh tries."""
        with self._database.begin() as connection:
            now = self._database.now()
            row = swap(connection, job_id, AFTER_A_RUN, State.QUEUED, AFRESH, actor=actor, at=now)
        return None if row is None else job_of(row)

    # --- what the sweep asks ------------------------------------------------------------------------------------------

    def expired(self) -> list[Job]:
        """RUNNING jobs whose worker has not been heard of within its lease."""
        table = schema.jobs
        silent = table.c.lease_until <= self._database.now()
        query = select(table).where(table.c.state == State.RUNNING.value, silent)
        return [job_of(row) for row in self._database.read(query)]

    def due(self, requeue_seconds: float) -> list[Job]:
        """Jobs that need a message in a queue: never enqueued, or so long ago that the message may be lost.

        QUEUED jobs are for `process`, DELIVERING ones for `deliver`, and so are DELIVERED ones where a destination is
        to be asked for storage commitment. A superfluous message does no harm.
        """
        table, now = schema.jobs, self._database.now()
        lost = table.c.enqueued_at <= later(now, -requeue_seconds)
        query = select(table).where(
            or_(
                and_(table.c.state.in_([State.QUEUED.value, State.DELIVERING.value]), table.c.due_at.is_(None)),
                and_(table.c.state.in_([state.value for state in MAY_BE_DUE]), table.c.due_at <= now),
            ),
            is_free(now),
            or_(table.c.enqueued_at.is_(None), lost),
        )
        return [job_of(row) for row in self._database.read(query.order_by(table.c.created_at))]

    def mark_enqueued(self, job_id: str) -> None:
        """Note that a message was handed to the broker; what `service.core.queue.enqueue` does."""
        change = update(schema.jobs).where(schema.jobs.c.id == job_id)
        with self._database.begin() as connection:
            connection.execute(change.values(enqueued_at=self._database.now()))


def _new_job(study_uid: str, instances: Sequence[Instance], options: JobOptions, source: str, now: datetime) -> Job:
    lines = sorted(f"{item.sop_instance_uid} {item.sha256}" for item in instances)
    return Job(
        id=uuid4().hex,
        study_uid=study_uid,
        state=State.QUEUED,
        options=options,
        input_hash=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        attempt=0,
        created_at=now,
        updated_at=now,
        source=source,
    )


def _jobs_alike(connection: Connection, study_uid: str, options: JobOptions) -> Sequence[Row[Any]]:
    table = schema.jobs
    query = select(table).where(table.c.study_uid == study_uid, table.c.options_hash == hash_of(options))
    return connection.execute(query).all()


def _wanted(
    connection: Connection,
    fresh: Job,
    instances: Sequence[Instance],
    considered: int,
    rivals: Sequence[Row[Any]],
    *,
    actor: str,
) -> tuple[Job, bool]:
    """Insert the job, or take the one with the same input; supersede the others."""
    table, now = schema.jobs, fresh.created_at
    known = next((row for row in rivals if row.input_hash == fresh.input_hash), None)
    outdated = [row for row in rivals if row.considered < considered and not row.superseded_by and row is not known]
    if known is None:
        late = "; ".join(f"re-opens job {row.id} ({row.state}): more images arrived" for row in outdated)
        fresh = replace(fresh, detail=late)
        connection.execute(table.insert().values(row_of(fresh) | {"considered": considered}))
        inputs = [{"job_id": fresh.id, "sop_instance_uid": item.sop_instance_uid} for item in instances]
        insert_new(connection, schema.job_inputs, inputs)
        record(connection, fresh, None, actor=actor, at=now)
    job_id = fresh.id if known is None else known.id
    values = {"considered": considered, "superseded_by": None}
    row = connection.execute(update(table).where(table.c.id == job_id).values(values).returning(table)).one()
    for other in outdated:
        _supersede(connection, other.id, job_id, at=now)
    if known is not None and known.superseded_by and known.state == State.CANCELLED.value:
        row = swap(connection, job_id, [State.CANCELLED], State.QUEUED, AFRESH, actor=actor, at=now) or row
    return job_of(row), known is None or row.state != known.state


def _supersede(connection: Connection, job_id: str, by: str, *, at: datetime) -> None:
    """What was made from less of a study, and is not computed yet or waits for a person, is stopped."""
    table = schema.jobs
    connection.execute(update(table).where(table.c.id == job_id).values(superseded_by=by))
    values = {"detail": f"superseded by job {by}: more images arrived", "lease_until": None, "due_at": None}
    swap(connection, job_id, NOT_COMPUTED, State.CANCELLED, values, actor=LEDGER, at=at)
