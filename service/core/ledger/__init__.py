"""The ledger: what has arrived, which jobs exist, where each stands and why. The truth; queues only carry ids.

Hides SQL, two databases (SQLite in WAL mode, PostgreSQL) and concurrency. A state changes by one
`UPDATE ... WHERE state IN (...)`, so of two writers one wins and the other is told; every change leaves a row of
history. A worker proves that it still owns a job by its attempt number: results of an older attempt change nothing.
Whoever changes more than one row about a job locks the job's own row first, so no two wait for each other.
Must never be written around: no other module issues SQL. Must never hold patient data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, Self
from uuid import uuid4

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Row,
    Table,
    and_,
    create_engine,
    delete,
    event,
    exists,
    func,
    make_url,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from service.core.dicom.commitment import MessageError, Reference, Report, Request
from service.core.dicom.status import CLASS_INSTANCE_CONFLICT, INVALID_ARGUMENT
from service.core.errors import Reason
from service.core.job import TRANSITIONS, Job, JobOptions, Stage, State
from service.core.ledger import schema

MIGRATION_LOCK = 0x10_36AD  # any constant: serialises migrations of several processes on PostgreSQL
CLOCK_SECONDS = 60  # two quartz clocks drift apart by milliseconds in that time
BUSY_SECONDS = 30  # how long a writer waits for the others on SQLite
MAY_BE_DUE = (State.QUEUED, State.DELIVERING, State.DELIVERED)
UNDER_WAY = (State.QUEUED, State.RUNNING, State.DELIVERING)
NOT_COMPUTED = (State.QUEUED, State.RUNNING, State.NEEDS_REVIEW)
ACTOR = "ledger"  # of what follows from something else, for the history
AFRESH: dict[str, Any] = {
    "tries": 0,
    "due_at": None,
    "enqueued_at": None,
    "lease_until": None,
    "reason": None,
    "detail": "",
}
AFTER_A_RUN = (
    State.COMPUTED,
    State.DELIVERED,
    State.COMMITTED,
    State.NEEDS_REVIEW,
    State.REJECTED,
    State.FAILED,
    State.CANCELLED,
)


class Added(Enum):
    """What the ledger knew about an instance that arrived."""

    NEW = "new"
    DUPLICATE = "duplicate"  # same SOPInstanceUID and same bytes (or the same object in another transfer syntax)
    CONFLICT = "conflict"  # same SOPInstanceUID, other bytes: the first one is kept


class Identified(Protocol):
    """What tells whether two received objects are the same."""

    @property
    def sop_instance_uid(self) -> str:
        """Identifies the object, and nobody else's: that is what is checked."""

    @property
    def study_uid(self) -> str:
        """Where it belongs."""

    @property
    def series_uid(self) -> str:
        """Where it belongs."""

    @property
    def transfer_syntax_uid(self) -> str:
        """How it is encoded."""

    @property
    def sha256(self) -> str:
        """Of its bytes in the spool."""


@dataclass(frozen=True)
class Instance:
    """One received DICOM object; its bytes lie in the spool under `sha256`."""

    sop_instance_uid: str
    study_uid: str
    series_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    sha256: str
    size: int  # bytes
    received_at: datetime
    source: str  # "dimse:CALLING_AE" or "rest"
    summary: dict[str, Any] = field(default_factory=dict)  # service.core.dicom.series.HeaderSummary as JSON


@dataclass(frozen=True)
class WaitingStudy:
    """A study with instances that no job covers yet."""

    study_uid: str
    last_received_at: datetime
    instances: int  # all instances of the study, covered or not


@dataclass(frozen=True)
class Transition:
    """One line of a job's history. `from_state` is None for its creation."""

    at: datetime
    from_state: State | None
    to_state: State
    actor: str
    reason: Reason | None
    detail: str
    attempt: int


class DeliveryStatus(Enum):
    """What a destination said about one result instance."""

    PENDING = "PENDING"
    SENT = "SENT"  # answered with success or a warning
    FAILED = "FAILED"  # refused: sending again as it is will not help


class Commitment(Enum):
    """Whether a destination has committed itself to keep one result instance (PS3.4 annex J)."""

    NONE = "NONE"  # it is not asked
    WANTED = "WANTED"  # it was asked and has not answered, or will be asked
    COMMITTED = "COMMITTED"
    REFUSED = "REFUSED"  # it does not; `failure_reason` says why


@dataclass(frozen=True)
class Delivery:
    """One result instance for one destination."""

    destination: str
    sop_instance_uid: str
    kind: str  # a value of service.core.job.Kind
    path: str  # relative to the job's result folder
    sop_class_uid: str
    status: DeliveryStatus = DeliveryStatus.PENDING
    dimse_status: int | None = None  # PS3.7 annex C
    attempts: int = 0
    last_error: str = ""
    updated_at: datetime | None = None
    commitment: Commitment = Commitment.NONE
    failure_reason: int | None = None  # PS3.3 C.14.1.1

    @property
    def is_open(self) -> bool:
        """Whether it waits for storage commitment."""
        return self.commitment in OPEN


OPEN = (Commitment.WANTED, Commitment.REFUSED)
OWED: dict[str, Any] = {"commitment": Commitment.WANTED.value, "failure_reason": None}
OPEN_VALUES = [commitment.value for commitment in OPEN]


@dataclass(frozen=True)
class Transaction:
    """One request for storage commitment of ours. A transaction is answered once; every request is a new one."""

    transaction_uid: str
    job_id: str
    destination: str
    asked_at: datetime
    due_at: datetime  # when the next one starts, as things stand
    answered_at: datetime | None


@dataclass(frozen=True)
class Noted:
    """What a report of storage commitment changed: how many instances of the job are now kept, and how many refused."""

    job_id: str
    committed: int = 0
    refused: int = 0


@dataclass(frozen=True)
class CommitmentRequest:
    """One request for storage commitment that somebody made of us and that is to be answered."""

    ae_title: str
    transaction_uid: str
    references: tuple[Reference, ...]
    tries: int


class Ledger:
    """An open ledger. Safe to share between threads; every process opens its own.

    Args:
        engine: made by `Ledger.open`.
        clock: gives the present moment, timezone-aware.
    """

    def __init__(self, engine: Engine, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._reader = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._clock = clock

    @classmethod
    def open(cls, url: str, clock: Callable[[], datetime] | None = None) -> Ledger:
        """Connect and bring the tables up to date; several processes may do so at the same time.

        Args:
            url: of SQLAlchemy.
            clock: for tests. Unset: the database's, so that machines whose own clocks disagree still agree on leases.

        Raises:
            sqlalchemy.exc.OperationalError: the database cannot be reached.
        """
        engine = _engine(make_url(url))
        _migrate(engine)
        return cls(engine, clock or _clock_of(engine.url))

    def close(self) -> None:
        """Give back the connections."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def now(self) -> datetime:
        """The present moment, by the clock that all moments in the ledger are compared with."""
        return self._clock()

    def ping(self) -> None:
        """Ask the database for one row.

        Raises:
            sqlalchemy.exc.OperationalError: the database cannot be reached.
        """
        with self._reader.connect() as connection:
            connection.execute(text("SELECT 1"))

    # --- what has arrived ---------------------------------------------------------------------------------------------

    def add_instance(self, instance: Instance) -> Added:
        """Note an instance whose bytes are already durable. Durable itself when this returns."""
        table = schema.instances
        with self._engine.begin() as connection:
            if _insert_new(connection, table, [asdict(instance)]):
                return Added.NEW
            query = select(table).where(table.c.sop_instance_uid == instance.sop_instance_uid)
            known = _instance(connection.execute(query).one())
        return Added.DUPLICATE if _same_object(known, instance) else Added.CONFLICT

    def instances(self, study_uid: str) -> list[Instance]:
        """Everything received of one study, oldest first."""
        table = schema.instances
        query = select(table).where(table.c.study_uid == study_uid)
        return [_instance(row) for row in self._read(query.order_by(table.c.received_at, table.c.sop_instance_uid))]

    def instance(self, sop_instance_uid: str) -> Instance | None:
        """What was received under that UID, if anything."""
        rows = self._read(select(schema.instances).where(schema.instances.c.sop_instance_uid == sop_instance_uid))
        return _instance(rows[0]) if rows else None

    def conflicts(self, arriving: Sequence[Identified]) -> int:
        """How many of these would be a CONFLICT, with what is known, in whatever study, or with each other."""
        table, known = schema.instances, dict[str, Identified]()
        uids = sorted({item.sop_instance_uid for item in arriving})
        for some in _batches(uids):
            rows = self._read(select(table).where(table.c.sop_instance_uid.in_(some)))
            known |= {row.sop_instance_uid: _instance(row) for row in rows}
        return sum(not _same_object(known.setdefault(item.sop_instance_uid, item), item) for item in arriving)

    def studies_waiting(self) -> list[WaitingStudy]:
        """Studies with instances that no job covers, longest-waiting first."""
        table = schema.instances
        uncovered = select(table.c.study_uid).where(table.c.job_id.is_(None)).distinct()
        last = func.max(table.c.received_at).label("last")
        query = (
            select(table.c.study_uid, last, func.count().label("total"))
            .where(table.c.study_uid.in_(uncovered))
            .group_by(table.c.study_uid)
            .order_by(last)
        )
        return [WaitingStudy(row.study_uid, row.last, row.total) for row in self._read(query)]

    def holds(self, sha256: str) -> bool:
        """Whether an instance with these bytes is known; what the spool's janitor asks."""
        table = schema.instances
        return bool(self._read(select(table.c.sha256).where(table.c.sha256 == sha256).limit(1)))

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def create_job(
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
        fresh = _new_job(study_uid, instances, options, source, self._clock())
        with self._engine.begin() as connection:
            _one_at_a_time(connection, study_uid)
            rivals = _jobs_alike(connection, study_uid, options)
            newest = max(rivals, key=lambda row: row.considered, default=None)
            if newest is not None and newest.considered > len(looked_at):
                job, created = _job(newest), False
            else:
                job, created = self._wanted(connection, fresh, instances, len(looked_at), rivals, actor=actor or source)
            _stop_waiting(connection, job.id, sorted(looked_at))
        return job, created

    def job(self, job_id: str) -> Job | None:
        """The job of that id."""
        rows = self._read(select(schema.jobs).where(schema.jobs.c.id == job_id))
        return _job(rows[0]) if rows else None

    def jobs(
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
        if before is not None and (last := self.job(before)):
            older = and_(table.c.created_at == last.created_at, table.c.id < last.id)
            query = query.where(or_(table.c.created_at < last.created_at, older))
        return [_job(row) for row in self._read(query)]

    def inputs(self, job_id: str) -> list[Instance]:
        """The instances a job was made for."""
        table, chosen = schema.instances, schema.job_inputs
        query = (
            select(table)
            .join(chosen, chosen.c.sop_instance_uid == table.c.sop_instance_uid)
            .where(chosen.c.job_id == job_id)
            .order_by(table.c.sop_instance_uid)
        )
        return [_instance(row) for row in self._read(query)]

    def history(self, job_id: str) -> list[Transition]:
        """Everything that happened to a job, oldest first."""
        table = schema.transitions
        rows = self._read(select(table).where(table.c.job_id == job_id).order_by(table.c.id))
        return [_transition(row) for row in rows]

    def counts(self) -> dict[State, int]:
        """How many jobs stand in each state; every state is present."""
        table = schema.jobs
        rows = self._read(select(table.c.state, func.count().label("total")).group_by(table.c.state))
        return dict.fromkeys(State, 0) | {State(row.state): row.total for row in rows}

    # --- state changes ------------------------------------------------------------------------------------------------

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
    ) -> Job | None:
        """Change the state, if it is one of `from_states` and, where given, the attempt is still `attempt`.

        A job moved to QUEUED with `due_at` is enqueued by the sweep at that moment; its tries go on counting.

        Returns:
            The job as it is now, or None when somebody else was faster.

        Raises:
            ValueError: the table of transitions forbids one of the changes (a mistake of the caller).
        """
        values: dict[str, Any] = {
            "reason": reason.name if reason else None,
            "detail": detail,
            "due_at": due_at,
            "enqueued_at": None,
            "lease_until": None,
        }
        if report is not None:
            values["report"] = report
        with self._engine.begin() as connection:
            return _job_or_none(self._swap(connection, job_id, from_states, to, values, actor=actor, attempt=attempt))

    def claim(self, job_id: str, worker: str, lease_seconds: float) -> Job | None:
        """Take a QUEUED job to run it; None when it is not there to be taken (a second message is a no-op).

        What an earlier run made is no longer to be sent, whatever comes of this one.
        """
        values = self._lease(worker, lease_seconds) | {"stage": None, "progress": 0.0, "reason": None, "detail": ""}
        with self._engine.begin() as connection:
            row = self._swap(connection, job_id, [State.QUEUED], State.RUNNING, values, actor=worker)
            if row:
                for table in (schema.deliveries, schema.commitments):
                    connection.execute(delete(table).where(table.c.job_id == job_id))
        return _job_or_none(row)

    def claim_delivery(self, job_id: str, worker: str, lease_seconds: float) -> Job | None:
        """Take a DELIVERING job to send it; None when somebody is sending it, or it is no longer to be sent."""
        table = schema.jobs
        free = or_(table.c.lease_until.is_(None), table.c.lease_until <= self._clock())
        values = self._lease(worker, lease_seconds) | {"stage": Stage.DELIVER.value}
        return self._touch(job_id, State.DELIVERING, values, free)

    def postpone_delivery(self, job_id: str, attempt: int, due_at: datetime, reason: Reason, detail: str) -> Job | None:
        """Give a delivery back: the sweep enqueues it again at `due_at`."""
        values = {
            "due_at": due_at,
            "reason": reason.name,
            "detail": detail,
            "lease_until": None,
            "enqueued_at": None,
        }
        return self._touch(job_id, State.DELIVERING, values, schema.jobs.c.attempt == attempt)

    def heartbeat(
        self,
        job: Job,
        stage: Stage | None = None,
        progress: float | None = None,
        *,
        lease_seconds: float,
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
        values: dict[str, Any] = {"lease_until": self._clock() + timedelta(seconds=lease_seconds)}
        values |= {"stage": stage.value} if stage else {}
        values |= {"progress": min(max(progress, 0.0), 1.0)} if progress is not None else {}
        table = schema.jobs
        ours = and_(table.c.id == job.id, table.c.attempt == job.attempt, table.c.state == job.state.value)
        change = update(table).where(ours, table.c.lease_until.is_not(None))
        with self._engine.begin() as connection:
            return bool(connection.execute(change.values(values)).rowcount)

    def finish(
        self, job_id: str, attempt: int, *, actor: str, report: dict[str, Any], deliveries: Iterable[Delivery] = ()
    ) -> Job | None:
        """The result is published: RUNNING -> COMPUTED, and on to DELIVERING where there is something to deliver.

        One transaction, so no result can be computed and then forgotten. None when the attempt is no longer ours.
        """
        values = {"report": report, "progress": 1.0, "lease_until": None, "tries": 0, "enqueued_at": None}
        with self._engine.begin() as connection:
            row = self._swap(connection, job_id, [State.RUNNING], State.COMPUTED, values, actor=actor, attempt=attempt)
            if row and self._plan(connection, job_id, deliveries):
                row = self._swap(connection, job_id, [State.COMPUTED], State.DELIVERING, {}, actor=actor)
        return _job_or_none(row)

    def cancel(self, job_id: str, actor: str, detail: str = "") -> Job | None:
        """Stop a job wherever it can be stopped; a worker notices at its next heartbeat."""
        return self.move(job_id, _sources_of(State.CANCELLED), State.CANCELLED, actor=actor, detail=detail)

    def rerun(self, job_id: str, actor: str) -> Job | None:
        """Compute again from the same input, with fresh tries."""
        with self._engine.begin() as connection:
            return _job_or_none(self._swap(connection, job_id, AFTER_A_RUN, State.QUEUED, AFRESH, actor=actor))

    def resend(self, job_id: str, actor: str, deliveries: Iterable[Delivery] = ()) -> Job | None:
        """Send a result again, with fresh tries. After a failure only what is missing, otherwise everything.

        Whoever was asked for storage commitment is asked again, in new transactions; the old ones are unknown from now.

        Args:
            job_id: a job in COMPUTED, DELIVERED or FAILED.
            actor: who asks.
            deliveries: more rows, for destinations the job was not made for.

        Returns:
            None when there is nothing to send or the state does not allow it.
        """
        table = schema.deliveries
        anything = exists().where(table.c.job_id == job_id)
        again = update(table).where(table.c.job_id == job_id)
        with self._engine.begin() as connection:
            _hold(connection, job_id)
            self._plan(connection, job_id, deliveries)
            sources = _sources_of(State.DELIVERING)
            values = AFRESH | {"attempt": schema.jobs.c.attempt + 1}  # whoever still holds the job has lost it
            row = self._swap(connection, job_id, sources, State.DELIVERING, values, actor=actor, only_if=anything)
            if row is None:
                connection.rollback()
                return None
            if row.previous_state == State.FAILED.value:
                missing = table.c.status != DeliveryStatus.SENT.value
                again = again.where(or_(missing, table.c.commitment == Commitment.REFUSED.value))
            connection.execute(again.values(status=DeliveryStatus.PENDING.value, last_error=""))
            asked = again.where(table.c.commitment != Commitment.NONE.value)
            connection.execute(asked.values(OWED))
            connection.execute(delete(schema.commitments).where(schema.commitments.c.job_id == job_id))
        return _job(row)

    # --- deliveries ---------------------------------------------------------------------------------------------------

    def deliveries(self, job_id: str) -> list[Delivery]:
        """What was, is or will be sent of a job."""
        table = schema.deliveries
        query = select(table).where(table.c.job_id == job_id)
        rows = self._read(query.order_by(table.c.destination, table.c.kind, table.c.path))
        return [_delivery(row) for row in rows]

    def record_delivery(
        self,
        job_id: str,
        destination: str,
        sop_instance_uid: str,
        status: DeliveryStatus,
        *,
        attempt: int,
        dimse_status: int | None = None,
        error: str = "",
    ) -> bool:
        """Note what the destination said about one instance, as soon as it has said it.

        Returns:
            False when the job is no longer this attempt's, or no more: stop.
        """
        table = schema.deliveries
        change = update(table).where(
            table.c.job_id == job_id,
            table.c.destination == destination,
            table.c.sop_instance_uid == sop_instance_uid,
        )
        values = {
            "status": status.value,
            "dimse_status": dimse_status,
            "last_error": error,
            "updated_at": self._clock(),
        }
        with self._engine.begin() as connection:
            job = _hold(connection, job_id)
            if job is None or job.attempt != attempt:
                return False
            connection.execute(change.values(values | {"attempts": table.c.attempts + 1}))
        return True

    # --- storage commitment, of results (PS3.4 annex J, as SCU) -------------------------------------------------------

    def delivered(self, job_id: str, attempt: int, *, actor: str, committing: Mapping[str, bool]) -> Job | None:
        """Everything is sent: DELIVERING -> DELIVERED. `committing` says which destinations are asked to keep it."""
        values = {"reason": None, "detail": "", "due_at": None, "enqueued_at": None, "lease_until": None}
        with self._engine.begin() as connection:
            row = self._swap(
                connection, job_id, [State.DELIVERING], State.DELIVERED, values, actor=actor, attempt=attempt
            )
            if row is None:
                return None
            _choose_committing(connection, job_id, committing)
            return self._settle(connection, job_id, actor)

    def claim_commitment(
        self, job_id: str, worker: str, lease_seconds: float, committing: Mapping[str, bool]
    ) -> Job | None:
        """Take a DELIVERED job of which some destination is to be asked now; None when there is nothing to ask."""
        table, now = schema.jobs, self._clock()
        values = {
            "attempt": table.c.attempt + 1,
            "worker": worker,
            "lease_until": now + timedelta(seconds=lease_seconds),
        }
        free = or_(table.c.lease_until.is_(None), table.c.lease_until <= now)
        due = and_(table.c.id == job_id, table.c.state == State.DELIVERED.value, table.c.due_at <= now, free)
        with self._engine.begin() as connection:
            if connection.execute(update(table).where(due).values(values)).rowcount == 0:
                return None
            _choose_committing(connection, job_id, committing)
            job = self._settle(connection, job_id, worker)
            return job if job.state is State.DELIVERED and job.due_at is not None else None

    def ask_commitment(
        self, job_id: str, attempt: int, destination: str, transaction_uid: str, pause_seconds: float
    ) -> bool:
        """Note a request before it is sent, since its answer may come before we know that it arrived.

        Args:
            job_id: of a claimed job.
            attempt: of the claim.
            destination: whom we ask about everything of the job that it has not committed itself to.
            transaction_uid: never used before.
            pause_seconds: before the next request, if this one fails or is answered with failures.

        Returns:
            False when the job is no longer this attempt's: do not ask.
        """
        now, table = self._clock(), schema.deliveries
        due_at = now + timedelta(seconds=pause_seconds)
        row = {"transaction_uid": transaction_uid, "job_id": job_id, "destination": destination, "asked_at": now}
        row |= {"pause_seconds": pause_seconds, "due_at": due_at}
        refused = and_(table.c.job_id == job_id, table.c.destination == destination)
        refused = and_(refused, table.c.commitment == Commitment.REFUSED.value)
        with self._engine.begin() as connection:
            job = _hold(connection, job_id)
            if job is None or (job.attempt, job.state) != (attempt, State.DELIVERED.value):
                return False
            connection.execute(schema.commitments.insert().values(row))
            connection.execute(update(table).where(refused).values(OWED))
            self._settle(connection, job_id, ACTOR)
        return True

    def await_commitment(self, transaction_uid: str, seconds: float) -> None:
        """The request arrived: give the destination this long to answer before it is asked again."""
        table = schema.commitments
        change = update(table).where(table.c.transaction_uid == transaction_uid, table.c.answered_at.is_(None))
        with self._engine.begin() as connection:
            asked = _hold_asked(connection, transaction_uid)
            if asked is not None:
                connection.execute(change.values(due_at=self._clock() + timedelta(seconds=seconds)))
                self._settle(connection, asked.job_id, ACTOR)

    def transaction(self, transaction_uid: str) -> Transaction | None:
        """A request of ours, answered or not."""
        table = schema.commitments
        rows = self._read(select(table).where(table.c.transaction_uid == transaction_uid))
        return _transaction(rows[0]) if rows else None

    def transactions(self, job_id: str) -> list[Transaction]:
        """All requests for a job since it was last sent, oldest first."""
        table = schema.commitments
        rows = self._read(select(table).where(table.c.job_id == job_id).order_by(table.c.asked_at))
        return [_transaction(row) for row in rows]

    def answer_commitment(self, report: Report, destinations: Collection[str], *, actor: str) -> Noted:
        """Note what a destination answered, once. With its last instance committed, the job is COMMITTED.

        A destination that commits itself late has still committed itself; a late refusal is overtaken by the request
        that was made since. Instances that were not asked about change nothing; one that is kept under another SOP
        class than it was sent with is not kept (Failure Reason 0119H).

        Args:
            report: the answer.
            destinations: for whom whoever reports may speak.
            actor: for the history.

        Raises:
            MessageError: no such request was made, or of somebody else.
        """
        table, now = schema.commitments, self._clock()
        with self._engine.begin() as connection:
            asked = _hold_asked(connection, report.transaction_uid)
            if asked is None:
                raise MessageError(INVALID_ARGUMENT, "unknown transaction")
            if asked.destination not in destinations:
                raise MessageError(INVALID_ARGUMENT, "a report of what another destination was asked")
            if asked.answered_at is None:
                answer = {"answered_at": now, "due_at": now + timedelta(seconds=asked.pause_seconds)}
                connection.execute(
                    update(table).where(table.c.transaction_uid == report.transaction_uid).values(answer)
                )
                committed, failed = _compared(connection, asked, report)
                kept = _note_committed(connection, asked, committed)
                refused = _note_refused(connection, asked, failed) if _is_latest(connection, asked) else 0
                self._settle(connection, asked.job_id, actor)
                return Noted(asked.job_id, kept, refused)
        return Noted(asked.job_id)

    def leave_waiting(self, job_id: str, attempt: int, detail: str) -> Job | None:
        """Give a claimed DELIVERED job back; the sweep enqueues it when the next request is due."""
        values = {"lease_until": None, "detail": detail}
        return self._touch(job_id, State.DELIVERED, values, schema.jobs.c.attempt == attempt)

    def send_refused_again(self, job_id: str, attempt: int, reason: int, *, actor: str, detail: str) -> Job | None:
        """DELIVERED -> DELIVERING for what was refused for `reason`; the requests made so far go on counting."""
        table = schema.deliveries
        refused = and_(table.c.commitment == Commitment.REFUSED.value, table.c.failure_reason == reason)
        values = AFRESH | {"detail": detail}
        with self._engine.begin() as connection:
            row = self._swap(
                connection, job_id, [State.DELIVERED], State.DELIVERING, values, actor=actor, attempt=attempt
            )
            if row is not None:
                again = {"status": DeliveryStatus.PENDING.value, **OWED}
                connection.execute(update(table).where(table.c.job_id == job_id, refused).values(again))
        return _job_or_none(row)

    # --- storage commitment, of what was received (as SCP) ------------------------------------------------------------

    def add_request(self, ae_title: str, request: Request) -> bool:
        """Note what somebody asks us to keep. Durable when this returns; the same request again is answered again.

        Returns:
            False when this transaction is known with other instances.
        """
        table, now = schema.commitment_requests, self._clock()
        referenced = sorted([item.sop_class_uid, item.sop_instance_uid] for item in request.references)
        row: dict[str, Any] = {"ae_title": ae_title, "transaction_uid": request.transaction_uid}
        row |= {"referenced": referenced, "received_at": now, "tries": 0, "due_at": now}
        same = and_(table.c.ae_title == ae_title, table.c.transaction_uid == request.transaction_uid)
        with self._engine.begin() as connection:
            if _insert_new(connection, table, [row]):
                return True
            known = connection.execute(select(table.c.referenced).where(same)).scalar_one()
            if sorted(known) != referenced:
                return False
            given_up = and_(same, table.c.due_at.is_(None))
            connection.execute(update(table).where(given_up).values(due_at=now, tries=0))
        return True

    def claim_request(self, lease_seconds: float) -> CommitmentRequest | None:
        """The request that has waited longest for its report; nobody else gets it for so many seconds."""
        table, now = schema.commitment_requests, self._clock()
        query = select(table).where(table.c.due_at <= now).order_by(table.c.due_at).limit(1)
        for row in self._read(query):
            same = and_(table.c.ae_title == row.ae_title, table.c.transaction_uid == row.transaction_uid)
            values = {"due_at": now + timedelta(seconds=lease_seconds), "tries": table.c.tries + 1}
            change = update(table).where(same, table.c.due_at == row.due_at).values(values)
            with self._engine.begin() as connection:
                if connection.execute(change).rowcount:
                    references = tuple(Reference(*pair) for pair in row.referenced)
                    return CommitmentRequest(row.ae_title, row.transaction_uid, references, row.tries + 1)
        return None

    def settle_request(self, request: CommitmentRequest, due_at: datetime | None) -> None:
        """Report it again at `due_at`; None: it is done with."""
        table = schema.commitment_requests
        same = and_(table.c.ae_title == request.ae_title, table.c.transaction_uid == request.transaction_uid)
        with self._engine.begin() as connection:
            connection.execute(update(table).where(same).values(due_at=due_at))

    def overdue_requests(self, seconds: float) -> int:
        """How many requests have been due for longer than that: nobody reports."""
        table, since = schema.commitment_requests, self._clock() - timedelta(seconds=seconds)
        return int(self._read(select(func.count()).select_from(table).where(table.c.due_at <= since))[0][0])

    # --- what the sweep asks ------------------------------------------------------------------------------------------

    def expired(self) -> list[Job]:
        """RUNNING jobs whose worker has not been heard of within its lease."""
        table = schema.jobs
        query = select(table).where(table.c.state == State.RUNNING.value, table.c.lease_until <= self._clock())
        return [_job(row) for row in self._read(query)]

    def due(self, requeue_seconds: float) -> list[Job]:
        """Jobs that need a message in a queue: never enqueued, or so long ago that the message may be lost.

        QUEUED jobs are for `process`, DELIVERING ones for `deliver`, and so are DELIVERED ones where a destination is
        to be asked for storage commitment. A superfluous message does no harm.
        """
        table, now = schema.jobs, self._clock()
        lost = table.c.enqueued_at <= now - timedelta(seconds=requeue_seconds)
        query = select(table).where(
            or_(
                and_(table.c.state.in_([State.QUEUED.value, State.DELIVERING.value]), table.c.due_at.is_(None)),
                and_(table.c.state.in_([state.value for state in MAY_BE_DUE]), table.c.due_at <= now),
            ),
            or_(table.c.lease_until.is_(None), table.c.lease_until <= now),
            or_(table.c.enqueued_at.is_(None), lost),
        )
        return [_job(row) for row in self._read(query.order_by(table.c.created_at))]

    def mark_enqueued(self, job_id: str) -> None:
        """Note that a message was handed to the broker."""
        change = update(schema.jobs).where(schema.jobs.c.id == job_id)
        with self._engine.begin() as connection:
            connection.execute(change.values(enqueued_at=self._clock()))

    def forget(self, before: datetime, committing: Mapping[str, bool]) -> int:
        """Delete everything about studies in which nothing has happened since, and nothing is under way.

        A result whose destination is asked for storage commitment is under way until it is COMMITTED or a person
        cancels it: until then ours may be the only copy. Their bytes become the janitor's (`Spool.sweep_up`).

        Args:
            before: what was touched since stays.
            committing: whether each destination is asked now; a site may have switched it off since a job was made. One
                that is not named was renamed or removed, which switches nothing off.

        Returns:
            How many studies were forgotten.
        """
        job, instance = schema.jobs.c, schema.instances.c
        busy = select(job.study_uid).where(
            or_(
                job.updated_at >= before,
                job.state.in_([state.value for state in UNDER_WAY]),
                _lacks_commitment(committing),
            )
        )
        recent = select(instance.study_uid).where(or_(instance.received_at >= before, instance.job_id.is_(None)))
        query = select(job.study_uid).where(job.study_uid.not_in(busy), job.study_uid.not_in(recent)).distinct()
        asked_long_ago = delete(schema.commitment_requests).where(schema.commitment_requests.c.received_at < before)
        with self._engine.begin() as connection:
            connection.execute(asked_long_ago)
        forgotten = 0
        for study_uid in [row.study_uid for row in self._read(query)]:
            with self._engine.begin() as connection:
                _one_at_a_time(connection, study_uid)
                connection.execute(select(job.id).where(job.study_uid == study_uid).with_for_update())
                # Asked again: something may have happened while others were deleted.
                if connection.execute(query.where(job.study_uid == study_uid)).first():
                    _forget_study(connection, study_uid, before)
                    forgotten += 1
        return forgotten

    # --- inside -------------------------------------------------------------------------------------------------------

    def _wanted(
        self,
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
            connection.execute(table.insert().values(_job_row(fresh) | {"considered": considered}))
            inputs = [{"job_id": fresh.id, "sop_instance_uid": item.sop_instance_uid} for item in instances]
            _insert_new(connection, schema.job_inputs, inputs)
            _record(connection, fresh, None, actor=actor, at=now)
        job_id = fresh.id if known is None else known.id
        values = {"considered": considered, "superseded_by": None}
        row = connection.execute(update(table).where(table.c.id == job_id).values(values).returning(table)).one()
        for other in outdated:
            self._supersede(connection, other.id, job_id)
        if known is not None and known.superseded_by and known.state == State.CANCELLED.value:
            row = self._swap(connection, job_id, [State.CANCELLED], State.QUEUED, AFRESH, actor=actor) or row
        return _job(row), known is None or row.state != known.state

    def _supersede(self, connection: Connection, job_id: str, by: str) -> None:
        """What was made from less of a study, and is not computed yet or waits for a person, is stopped."""
        table = schema.jobs
        connection.execute(update(table).where(table.c.id == job_id).values(superseded_by=by))
        values = {"detail": f"superseded by job {by}: more images arrived", "lease_until": None, "due_at": None}
        self._swap(connection, job_id, NOT_COMPUTED, State.CANCELLED, values, actor=ACTOR)

    def _read(self, query: Any) -> Sequence[Row[Any]]:
        with self._reader.connect() as connection:
            return connection.execute(query).all()

    def _lease(self, worker: str, lease_seconds: float) -> dict[str, Any]:
        table = schema.jobs
        return {
            "attempt": table.c.attempt + 1,
            "tries": table.c.tries + 1,
            "worker": worker,
            "lease_until": self._clock() + timedelta(seconds=lease_seconds),
            "due_at": None,
        }

    def _swap(
        self,
        connection: Connection,
        job_id: str,
        from_states: Collection[State],
        to: State,
        values: dict[str, Any],
        *,
        actor: str,
        attempt: int | None = None,
        only_if: ColumnElement[bool] | None = None,
    ) -> Row[Any] | None:
        """The one statement that changes a state, and the line of history it leaves."""
        if forbidden := [state.value for state in from_states if to not in TRANSITIONS[state]]:
            raise ValueError(f"no transition from {', '.join(forbidden)} to {to.value}")
        table, now = schema.jobs, self._clock()
        change = (
            update(table)
            .where(table.c.id == job_id, table.c.state.in_([state.value for state in from_states]))
            .values(values | {"previous_state": table.c.state, "state": to.value, "updated_at": now})
            .returning(table)
        )
        change = change if attempt is None else change.where(table.c.attempt == attempt)
        change = change if only_if is None else change.where(only_if)
        row = connection.execute(change).one_or_none()
        if row is not None:
            _record(connection, _job(row), State(row.previous_state), actor=actor, at=now)
        return row

    def _touch(self, job_id: str, state: State, values: dict[str, Any], only_if: ColumnElement[bool]) -> Job | None:
        """Change a job without changing its state."""
        table = schema.jobs
        change = update(table).where(table.c.id == job_id, table.c.state == state.value, only_if)
        with self._engine.begin() as connection:
            row = connection.execute(
                change.values(values | {"updated_at": self._clock()}).returning(table)
            ).one_or_none()
        return _job_or_none(row)

    def _settle(self, connection: Connection, job_id: str, actor: str) -> Job:
        """What follows from how a job's deliveries stand: COMMITTED, or the moment of the next request."""
        table, rows = schema.jobs, schema.deliveries
        query = select(rows.c.destination, rows.c.status, rows.c.commitment).where(rows.c.job_id == job_id).distinct()
        found = connection.execute(query).all()
        waiting = {row.destination for row in found if row.commitment in OPEN_VALUES}
        all_sent = all(row.status == DeliveryStatus.SENT.value for row in found)
        if not waiting and all_sent and any(row.commitment == Commitment.COMMITTED.value for row in found):
            done = {"reason": None, "detail": "", "due_at": None, "lease_until": None}
            before = [State.DELIVERED, State.FAILED]
            self._swap(connection, job_id, before, State.COMMITTED, done, actor=actor)
        due_at = min((self._next_request(connection, job_id, name) for name in waiting), default=None)
        change = update(table).where(table.c.id == job_id, table.c.state == State.DELIVERED.value)
        connection.execute(change.values(due_at=due_at, enqueued_at=None))
        return _job(connection.execute(select(table).where(table.c.id == job_id)).one())

    def _next_request(self, connection: Connection, job_id: str, destination: str) -> datetime:
        table = schema.commitments
        query = select(table.c.due_at).where(table.c.job_id == job_id, table.c.destination == destination)
        due_at: datetime | None = connection.execute(query.order_by(table.c.asked_at.desc()).limit(1)).scalar()
        return due_at or self._clock()

    def _plan(self, connection: Connection, job_id: str, deliveries: Iterable[Delivery]) -> int:
        """Insert rows to deliver; those that exist become pending again."""
        table, planned = schema.deliveries, [_delivery_row(job_id, item, self._clock()) for item in deliveries]
        for row in planned:
            kept = {"job_id", "destination", "sop_instance_uid", "attempts"}
            fresh = {name: value for name, value in row.items() if name not in kept}
            keys = ["job_id", "destination", "sop_instance_uid"]
            connection.execute(
                _insert(connection, table).values(row).on_conflict_do_update(index_elements=keys, set_=fresh)
            )
        return len(planned)


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    if url.database:
        _use_write_ahead_log(Path(url.database))
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions by itself
        connection.execute("PRAGMA synchronous = FULL")  # a commit that was answered with 0x0000 survives a power cut
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Taking the write lock at once lets writers queue; a lock upgraded later fails instead of waiting.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


class _ServerClock:
    """The clock of a PostgreSQL server. It is asked once a minute, and followed by our own monotonic clock between."""

    def __init__(self, url: URL) -> None:
        self._engine = create_engine(url, poolclass=NullPool)  # never waits for a connection that its caller holds
        self._known = self._ask()

    def __call__(self) -> datetime:
        if time.monotonic() - self._known[1] > CLOCK_SECONDS:
            with contextlib.suppress(OperationalError):  # while it is away, nothing can be written anyway
                self._known = self._ask()
        moment, asked_at = self._known
        return moment + timedelta(seconds=time.monotonic() - asked_at)

    def _ask(self) -> tuple[datetime, float]:
        with self._engine.connect() as connection:
            before = time.monotonic()
            moment: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
            return moment.astimezone(UTC), (before + time.monotonic()) / 2


def _clock_of(url: URL) -> Callable[[], datetime]:
    """SQLite has no server: whoever writes to its file is on the same machine."""
    return _ServerClock(url) if url.get_backend_name() == "postgresql" else lambda: datetime.now(UTC)


def _use_write_ahead_log(path: Path) -> None:
    """Switch the file to WAL for good. SQLite does not wait for its lock here, so of several processes we do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + BUSY_SECONDS
    with contextlib.closing(sqlite3.connect(path)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", "service.core.ledger:migrations")
    config.set_main_option("path_separator", "os")
    head = ScriptDirectory.from_config(config).get_current_head()
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        if MigrationContext.configure(connection).get_current_revision() != head:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _insert(connection: Connection, table: Table) -> Any:
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def _insert_new(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> int:
    """Insert what is not there yet. Returns how many of the rows were new."""
    new = _insert(connection, table).on_conflict_do_nothing().returning(*table.primary_key)
    return sum(len(connection.execute(new.values(row)).all()) for row in rows)


def _one_at_a_time(connection: Connection, study_uid: str) -> None:
    """Let no other transaction make or forget a job of this study. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        key = int.from_bytes(hashlib.sha256(study_uid.encode()).digest()[:8], signed=True)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def _jobs_alike(connection: Connection, study_uid: str, options: JobOptions) -> Sequence[Row[Any]]:
    table = schema.jobs
    query = select(table).where(table.c.study_uid == study_uid, table.c.options_hash == _options_hash(options))
    return connection.execute(query).all()


def _stop_waiting(connection: Connection, job_id: str, sop_instance_uids: Sequence[str]) -> None:
    table = schema.instances
    for some in _batches(sop_instance_uids):
        connection.execute(update(table).where(table.c.sop_instance_uid.in_(some)).values(job_id=job_id))


def _batches(uids: Sequence[str]) -> Iterator[Sequence[str]]:
    """SQLite limits the number of parameters."""
    return (uids[start : start + 500] for start in range(0, len(uids), 500))


def _lacks_commitment(committing: Mapping[str, bool]) -> ColumnElement[bool]:
    """Whether some destination, for which it is not switched off, owes storage commitment of the job."""
    table = schema.deliveries
    open_there = and_(table.c.commitment.in_(OPEN_VALUES), table.c.destination.not_in(_switched(committing, on=False)))
    owed = exists().where(table.c.job_id == schema.jobs.c.id, open_there)
    return and_(owed, schema.jobs.c.state != State.CANCELLED.value)


def _choose_committing(connection: Connection, job_id: str, committing: Mapping[str, bool]) -> None:
    """Ask these, and not those: a site may have switched it on or off since the job was made."""
    table = schema.deliveries
    of_job = table.c.job_id == job_id
    to_ask, not_to_ask = (table.c.destination.in_(_switched(committing, on=on)) for on in (True, False))
    on = update(table).where(of_job, to_ask, table.c.commitment == Commitment.NONE.value)
    off = update(table).where(of_job, not_to_ask, table.c.commitment.in_(OPEN_VALUES))
    connection.execute(on.values(commitment=Commitment.WANTED.value))
    connection.execute(off.values(commitment=Commitment.NONE.value, failure_reason=None))


def _switched(committing: Mapping[str, bool], *, on: bool) -> list[str]:
    return [name for name, is_on in committing.items() if is_on == on]


def _hold(connection: Connection, job_id: str) -> Row[Any] | None:
    """The job, changed by nobody else until the end of the transaction. SQLite has one writer anyway."""
    return connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id).with_for_update()).one_or_none()


def _hold_asked(connection: Connection, transaction_uid: str) -> Row[Any] | None:
    """The request with that Transaction UID, its job held: two answers to one job come one after the other."""
    query = select(schema.commitments).where(schema.commitments.c.transaction_uid == transaction_uid)
    asked = connection.execute(query).one_or_none()
    if asked is None or _hold(connection, asked.job_id) is None:
        return None
    return connection.execute(query).one_or_none()  # it may have been answered, or deleted, before the job was ours


def _asked_about(asked: Row[Any]) -> ColumnElement[bool]:
    table = schema.deliveries
    return and_(table.c.job_id == asked.job_id, table.c.destination == asked.destination)


def _compared(connection: Connection, asked: Row[Any], report: Report) -> tuple[set[str], dict[str, int]]:
    """What is kept of what was asked about, as SOPInstanceUIDs, and what is not, with the Failure Reason."""
    table = schema.deliveries
    query = select(table.c.sop_instance_uid, table.c.sop_class_uid).where(_asked_about(asked))
    sent = {Reference(row.sop_class_uid, row.sop_instance_uid) for row in connection.execute(query)}
    committed = {item.sop_instance_uid for item in report.committed if item in sent}
    others = {item.sop_instance_uid for item in report.committed if item not in sent}
    failed = {item.sop_instance_uid: reason for item, reason in report.failed}
    return committed, dict.fromkeys(others - committed, CLASS_INSTANCE_CONFLICT) | failed


def _note_committed(connection: Connection, asked: Row[Any], sop_instance_uids: Collection[str]) -> int:
    table, noted = schema.deliveries, 0
    for some in _batches(sorted(sop_instance_uids)):
        named = and_(_asked_about(asked), table.c.sop_instance_uid.in_(some), table.c.commitment.in_(OPEN_VALUES))
        values = {"commitment": Commitment.COMMITTED.value, "status": DeliveryStatus.SENT.value, "failure_reason": None}
        noted += connection.execute(update(table).where(named).values(values)).rowcount
    return noted


def _note_refused(connection: Connection, asked: Row[Any], failed: Mapping[str, int]) -> int:
    table, noted = schema.deliveries, 0
    for reason in set(failed.values()):
        for some in _batches(sorted(uid for uid, why in failed.items() if why == reason)):
            named = and_(_asked_about(asked), table.c.sop_instance_uid.in_(some))
            wanted = and_(named, table.c.commitment == Commitment.WANTED.value)
            values = {"commitment": Commitment.REFUSED.value, "failure_reason": reason}
            noted += connection.execute(update(table).where(wanted).values(values)).rowcount
    return noted


def _is_latest(connection: Connection, asked: Row[Any]) -> bool:
    table = schema.commitments
    same = and_(table.c.job_id == asked.job_id, table.c.destination == asked.destination)
    later = select(table.c.transaction_uid).where(same, table.c.asked_at > asked.asked_at)
    return connection.execute(later.limit(1)).first() is None


def _forget_study(connection: Connection, study_uid: str, before: datetime) -> None:
    ids, old = select(schema.jobs.c.id).where(schema.jobs.c.study_uid == study_uid), schema.instances.c
    # An image that arrives at this moment was answered for and stays; it has no job that could be deleted under it.
    aged = delete(schema.instances).where(old.study_uid == study_uid, old.received_at < before)
    connection.execute(aged)
    for table in (schema.job_inputs, schema.transitions, schema.deliveries, schema.commitments):
        connection.execute(delete(table).where(table.c.job_id.in_(ids)))
    connection.execute(delete(schema.jobs).where(schema.jobs.c.study_uid == study_uid))


def _record(connection: Connection, job: Job, previous: State | None, *, actor: str, at: datetime) -> None:
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


def _sources_of(to: State) -> list[State]:
    return [state for state, following in TRANSITIONS.items() if to in following]


def _same_object(known: Identified, other: Identified) -> bool:
    """Bytes decide; in another transfer syntax the bytes must differ, and the UIDs have to be believed (PS3.5 9)."""
    if known.sha256 == other.sha256:
        return True
    same_place = (known.study_uid, known.series_uid) == (other.study_uid, other.series_uid)
    return same_place and known.transfer_syntax_uid != other.transfer_syntax_uid


def _input_hash(instances: Sequence[Instance]) -> str:
    lines = sorted(f"{item.sop_instance_uid} {item.sha256}" for item in instances)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _options_hash(options: JobOptions) -> str:
    return hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode()).hexdigest()


def _new_job(study_uid: str, instances: Sequence[Instance], options: JobOptions, source: str, now: datetime) -> Job:
    return Job(
        id=uuid4().hex,
        study_uid=study_uid,
        state=State.QUEUED,
        options=options,
        input_hash=_input_hash(instances),
        attempt=0,
        created_at=now,
        updated_at=now,
        source=source,
    )


def _job_row(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "study_uid": job.study_uid,
        "state": job.state.value,
        "options": asdict(job.options),
        "options_hash": _options_hash(job.options),
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


def _job(row: Row[Any]) -> Job:
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


def _job_or_none(row: Row[Any] | None) -> Job | None:
    return None if row is None else _job(row)


def _instance(row: Row[Any]) -> Instance:
    return Instance(
        sop_instance_uid=row.sop_instance_uid,
        study_uid=row.study_uid,
        series_uid=row.series_uid,
        sop_class_uid=row.sop_class_uid,
        transfer_syntax_uid=row.transfer_syntax_uid,
        sha256=row.sha256,
        size=row.size,
        received_at=row.received_at,
        source=row.source,
        summary=row.summary,
    )


def _transition(row: Row[Any]) -> Transition:
    return Transition(
        at=row.at,
        from_state=State(row.from_state) if row.from_state else None,
        to_state=State(row.to_state),
        actor=row.actor,
        reason=Reason[row.reason] if row.reason else None,
        detail=row.detail,
        attempt=row.attempt,
    )


def _delivery_row(job_id: str, delivery: Delivery, now: datetime) -> dict[str, Any]:
    values = {"status": delivery.status.value, "commitment": delivery.commitment.value, "updated_at": now}
    return asdict(delivery) | values | {"job_id": job_id}


def _delivery(row: Row[Any]) -> Delivery:
    return Delivery(
        destination=row.destination,
        sop_instance_uid=row.sop_instance_uid,
        kind=row.kind,
        path=row.path,
        sop_class_uid=row.sop_class_uid,
        status=DeliveryStatus(row.status),
        dimse_status=row.dimse_status,
        attempts=row.attempts,
        last_error=row.last_error,
        updated_at=row.updated_at,
        commitment=Commitment(row.commitment),
        failure_reason=row.failure_reason,
    )


def _transaction(row: Row[Any]) -> Transaction:
    return Transaction(row.transaction_uid, row.job_id, row.destination, row.asked_at, row.due_at, row.answered_at)
