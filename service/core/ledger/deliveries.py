"""The book of what is sent: one row for each result instance and destination, and what follows from how they stand.

Guarantees: of several workers one gets a delivery, together with its rows; what a destination said about an instance is
durable when `record` returns; only the attempt that holds the job may record or conclude, so a worker that was given up
changes nothing; a job is COMMITTED in the same transaction in which its last open row becomes so. Whoever changes rows
holds the job first (`states.hold`). Must never call an instance sent that a destination has not answered for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, and_, delete, exists, or_, select, update

from service.core.errors import Reason
from service.core.job import Job, Stage, State
from service.core.ledger import schema
from service.core.ledger.database import Database, insert
from service.core.ledger.states import AFRESH, hold, is_free, job_of, later, leased, record, sources_of, swap, touch


class DeliveryStatus(Enum):
    """What a destination said about one result instance."""

    PENDING = "PENDING"
    SENT = "SENT"  # answered with success or a warning
    FAILED = "FAILED"  # refused: sending again as it is will not help


class CommitmentStatus(Enum):
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
    commitment: CommitmentStatus = CommitmentStatus.NONE
    failure_reason: int | None = None  # PS3.3 C.14.1.1

    @property
    def is_open(self) -> bool:
        """Whether it waits for storage commitment."""
        return self.commitment in OPEN


OPEN = (CommitmentStatus.WANTED, CommitmentStatus.REFUSED)
OPEN_VALUES = [status.value for status in OPEN]
OWED: dict[str, Any] = {"commitment": CommitmentStatus.WANTED.value, "failure_reason": None}


class ClaimedDelivery(NamedTuple):
    """A job that is ours to send, and all its rows, also those that were sent before."""

    job: Job
    deliveries: list[Delivery]


class Deliveries:
    """See the head of this module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of_job(self, job_id: str) -> list[Delivery]:
        """What was, is or will be sent of a job."""
        return [delivery_of(row) for row in self._database.read(rows_of(job_id))]

    def claim(self, job_id: str, worker: str, lease_seconds: float) -> ClaimedDelivery | None:
        """Take a DELIVERING job to send it; None when somebody is sending it, or it is no longer to be sent."""
        now = self._database.now()
        values = leased(worker, later(now, lease_seconds)) | {"stage": Stage.DELIVER.value}
        with self._database.begin() as connection:
            job = touch(connection, job_id, State.DELIVERING, values, is_free(now), at=now)
            if job is None:
                return None
            return ClaimedDelivery(job, [delivery_of(row) for row in connection.execute(rows_of(job_id))])

    def record(
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
            False: stop. The job is no longer this attempt's, or no more, and nothing was noted; or it was cancelled or
            given up, and what was said about this instance is noted all the same, since it is true.
        """
        table, now = schema.deliveries, self._database.now()
        change = update(table).where(
            table.c.job_id == job_id,
            table.c.destination == destination,
            table.c.sop_instance_uid == sop_instance_uid,
        )
        said = {"status": status.value, "dimse_status": dimse_status, "last_error": error, "updated_at": now}
        with self._database.begin() as connection:
            job = hold(connection, job_id)
            if job is None or job.attempt != attempt:
                return False
            connection.execute(change.values(said | {"attempts": table.c.attempts + 1}))
        return bool(job.state == State.DELIVERING.value)

    def postpone(
        self,
        job: Job,
        due_at: datetime,
        reason: Reason,
        detail: str,
        *,
        actor: str,
        progress: float | None = None,
    ) -> Job | None:
        """Give a claimed delivery back: the sweep enqueues it again at `due_at`. Its history tells why.

        Returns:
            The job as it is now; None when it is no longer this attempt's.
        """
        values = {"due_at": due_at, "reason": reason.name, "detail": detail, "lease_until": None, "enqueued_at": None}
        values |= {} if progress is None else {"progress": progress}
        ours, now = schema.jobs.c.attempt == job.attempt, self._database.now()
        with self._database.begin() as connection:
            postponed = touch(connection, job.id, State.DELIVERING, values, ours, at=now)
            if postponed is not None:
                record(connection, postponed, State.DELIVERING, actor=actor, at=now)
        return postponed

    def finish(self, job_id: str, attempt: int, *, actor: str, committing: Mapping[str, bool]) -> Job | None:
        """Everything is sent: DELIVERING -> DELIVERED. `committing` says which destinations are asked to keep it.

        Returns:
            The job as it is now; its `due_at` is set where some destination is to be asked. None when the attempt is no
            longer ours.
        """
        now = self._database.now()
        values = {
            "reason": None,
            "detail": "",
            "due_at": None,
            "enqueued_at": None,
            "lease_until": None,
            "progress": 1.0,
        }
        with self._database.begin() as connection:
            before, to = [State.DELIVERING], State.DELIVERED
            if swap(connection, job_id, before, to, values, actor=actor, at=now, attempt=attempt) is None:
                return None
            choose_committing(connection, job_id, committing)
            return settle(connection, job_id, actor, at=now)

    def resend(self, job_id: str, actor: str, deliveries: Iterable[Delivery] = ()) -> Job | None:
        """Send a result again, with fresh tries. After a failure only what is missing, otherwise everything.

        Whoever was asked for storage commitment is asked again, in new transactions; the old ones are unknown from now.

        Args:
            job_id: a job in COMPUTED, DELIVERED, COMMITTED or FAILED.
            actor: who asks.
            deliveries: more rows, for destinations the job was not made for.

        Returns:
            None when there is nothing to send or the state does not allow it.
        """
        table, now = schema.deliveries, self._database.now()
        anything = exists().where(table.c.job_id == job_id)
        again = update(table).where(table.c.job_id == job_id)
        with self._database.begin() as connection:
            hold(connection, job_id)
            plan(connection, job_id, deliveries, at=now)
            sources, to = sources_of(State.DELIVERING), State.DELIVERING
            values = AFRESH | {"attempt": schema.jobs.c.attempt + 1}  # whoever still holds the job has lost it
            row = swap(connection, job_id, sources, to, values, actor=actor, at=now, only_if=anything)
            if row is None:
                connection.rollback()
                return None
            if row.previous_state == State.FAILED.value:
                missing = table.c.status != DeliveryStatus.SENT.value
                again = again.where(or_(missing, table.c.commitment == CommitmentStatus.REFUSED.value))
            connection.execute(again.values(status=DeliveryStatus.PENDING.value, last_error=""))
            connection.execute(again.where(table.c.commitment != CommitmentStatus.NONE.value).values(OWED))
            connection.execute(delete(schema.commitments).where(schema.commitments.c.job_id == job_id))
        return job_of(row)


def plan(connection: Connection, job_id: str, deliveries: Iterable[Delivery], *, at: datetime) -> int:
    """Insert rows to deliver; those that exist become pending again. Returns how many were planned."""
    table, planned = schema.deliveries, [_row(job_id, item, at) for item in deliveries]
    keys = ["job_id", "destination", "sop_instance_uid"]
    for row in planned:
        fresh = {name: value for name, value in row.items() if name not in {*keys, "attempts"}}
        new = insert(connection, table).values(row)
        connection.execute(new.on_conflict_do_update(index_elements=keys, set_=fresh))
    return len(planned)


def drop(connection: Connection, job_id: str) -> None:
    """What an earlier run made is no longer to be sent, nor to be kept by anybody."""
    for table in (schema.deliveries, schema.commitments):
        connection.execute(delete(table).where(table.c.job_id == job_id))


def choose_committing(connection: Connection, job_id: str, committing: Mapping[str, bool]) -> None:
    """Ask these, and not those: a site may have switched it on or off since the job was made."""
    table = schema.deliveries
    of_job = table.c.job_id == job_id
    to_ask, not_to_ask = (table.c.destination.in_(switched(committing, on=on)) for on in (True, False))
    on = update(table).where(of_job, to_ask, table.c.commitment == CommitmentStatus.NONE.value)
    off = update(table).where(of_job, not_to_ask, table.c.commitment.in_(OPEN_VALUES))
    connection.execute(on.values(commitment=CommitmentStatus.WANTED.value))
    connection.execute(off.values(commitment=CommitmentStatus.NONE.value, failure_reason=None))


def switched(committing: Mapping[str, bool], *, on: bool) -> list[str]:
    """The destinations for which storage commitment is switched on, or off."""
    return [name for name, is_on in committing.items() if is_on == on]


def settle(connection: Connection, job_id: str, actor: str, *, at: datetime) -> Job:
    """What follows from how a job's deliveries stand: COMMITTED, or the moment of the next request."""
    table, rows = schema.jobs, schema.deliveries
    query = select(rows.c.destination, rows.c.status, rows.c.commitment).where(rows.c.job_id == job_id).distinct()
    found = connection.execute(query).all()
    waiting = {row.destination for row in found if row.commitment in OPEN_VALUES}
    all_sent = all(row.status == DeliveryStatus.SENT.value for row in found)
    if not waiting and all_sent and any(row.commitment == CommitmentStatus.COMMITTED.value for row in found):
        done = {"reason": None, "detail": "", "due_at": None, "lease_until": None, "progress": 1.0}
        swap(connection, job_id, [State.DELIVERED, State.FAILED], State.COMMITTED, done, actor=actor, at=at)
    due_at = min((_next_request(connection, job_id, name) or at for name in waiting), default=None)
    change = update(table).where(table.c.id == job_id, table.c.state == State.DELIVERED.value)
    connection.execute(change.values(due_at=due_at, enqueued_at=None))
    return job_of(connection.execute(select(table).where(table.c.id == job_id)).one())


def rows_of(job_id: str) -> Any:
    """The query for all rows of a job, in the order in which they are sent."""
    table = schema.deliveries
    query = select(table).where(table.c.job_id == job_id)
    return query.order_by(table.c.destination, table.c.kind, table.c.path)


def delivery_of(row: Row[Any]) -> Delivery:
    """A stored delivery."""
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
        commitment=CommitmentStatus(row.commitment),
        failure_reason=row.failure_reason,
    )


def _row(job_id: str, delivery: Delivery, at: datetime) -> dict[str, Any]:
    values = {"status": delivery.status.value, "commitment": delivery.commitment.value, "updated_at": at}
    return asdict(delivery) | values | {"job_id": job_id}


def _next_request(connection: Connection, job_id: str, destination: str) -> datetime | None:
    """When a destination is to be asked next, as things stand; None: it was never asked."""
    table = schema.commitments
    query = select(table.c.due_at).where(and_(table.c.job_id == job_id, table.c.destination == destination))
    due_at: datetime | None = connection.execute(query.order_by(table.c.asked_at.desc()).limit(1)).scalar()
    return due_at
