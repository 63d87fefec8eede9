"""The book of what we ask of destinations: to commit themselves to keep our results (PS3.4 annex J, as SCU).

Guarantees: a request is noted before it is sent, since its answer may come before we know that it arrived; a request is
answered once, and only by the destination that was asked; of two requests for one destination the later one counts for
refusals, and either for a commitment; with the last instance committed the job is COMMITTED in the same transaction.
Answers to one job come one after the other, because each holds the job first (`states.hold`). Must never take a
destination's word for an instance that it was not asked about.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, and_, select, update

from service.core.actor import LEDGER
from service.core.dicom.commitment import MessageError, Reference, Report
from service.core.dicom.status import CLASS_INSTANCE_CONFLICT, INVALID_ARGUMENT
from service.core.job import Job, State
from service.core.ledger import schema
from service.core.ledger.database import Database, batches
from service.core.ledger.deliveries import (
    OPEN_VALUES,
    OWED,
    CommitmentStatus,
    Delivery,
    DeliveryStatus,
    choose_committing,
    delivery_of,
    rows_of,
    settle,
)
from service.core.ledger.states import AFRESH, hold, is_free, job_of, later, swap, touch


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


class ClaimedCommitment(NamedTuple):
    """A job whose destinations are ours to ask, all its rows, and the requests since it was last sent, oldest first."""

    job: Job
    deliveries: list[Delivery]
    transactions: list[Transaction]


class Commitments:
    """See the head of this module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(
        self, job_id: str, worker: str, lease_seconds: float, committing: Mapping[str, bool]
    ) -> ClaimedCommitment | None:
        """Take a DELIVERED job of which some destination is to be asked now; None when there is nothing to ask."""
        table, now = schema.jobs, self._database.now()
        values = {"attempt": table.c.attempt + 1, "worker": worker, "lease_until": later(now, lease_seconds)}
        due = and_(table.c.id == job_id, table.c.state == State.DELIVERED.value, table.c.due_at <= now, is_free(now))
        with self._database.begin() as connection:
            if connection.execute(update(table).where(due).values(values)).rowcount == 0:
                return None
            choose_committing(connection, job_id, committing)
            job = settle(connection, job_id, worker, at=now)
            if job.state is not State.DELIVERED or job.due_at is None:
                return None
            deliveries = [delivery_of(row) for row in connection.execute(rows_of(job_id))]
            return ClaimedCommitment(job, deliveries, [_transaction(row) for row in connection.execute(_of(job_id))])

    def ask(self, job_id: str, attempt: int, destination: str, transaction_uid: str, pause_seconds: float) -> bool:
        """Note a request, before it is sent.

        Args:
            job_id: of a claimed job.
            attempt: of the claim.
            destination: whom we ask about everything of the job that it has not committed itself to.
            transaction_uid: never used before.
            pause_seconds: before the next request, if this one fails or is answered with failures.

        Returns:
            False when the job is no longer this attempt's: do not ask.
        """
        now, table = self._database.now(), schema.deliveries
        row = {"transaction_uid": transaction_uid, "job_id": job_id, "destination": destination, "asked_at": now}
        row |= {"pause_seconds": pause_seconds, "due_at": later(now, pause_seconds)}
        refused = and_(table.c.job_id == job_id, table.c.destination == destination)
        refused = and_(refused, table.c.commitment == CommitmentStatus.REFUSED.value)
        with self._database.begin() as connection:
            job = hold(connection, job_id)
            if job is None or (job.attempt, job.state) != (attempt, State.DELIVERED.value):
                return False
            connection.execute(schema.commitments.insert().values(row))
            connection.execute(update(table).where(refused).values(OWED))
            settle(connection, job_id, LEDGER, at=now)
        return True

    def give_time(self, transaction_uid: str, seconds: float) -> None:
        """The request arrived: give the destination this long to answer before it is asked again."""
        table, now = schema.commitments, self._database.now()
        change = update(table).where(table.c.transaction_uid == transaction_uid, table.c.answered_at.is_(None))
        with self._database.begin() as connection:
            asked = _hold_asked(connection, transaction_uid)
            if asked is not None:
                connection.execute(change.values(due_at=later(now, seconds)))
                settle(connection, asked.job_id, LEDGER, at=now)

    def get(self, transaction_uid: str) -> Transaction | None:
        """A request of ours, answered or not."""
        table = schema.commitments
        rows = self._database.read(select(table).where(table.c.transaction_uid == transaction_uid))
        return _transaction(rows[0]) if rows else None

    def of_job(self, job_id: str) -> list[Transaction]:
        """All requests for a job since it was last sent, oldest first."""
        return [_transaction(row) for row in self._database.read(_of(job_id))]

    def answer(self, report: Report, destinations: Collection[str], *, actor: str) -> Noted:
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
        table, now = schema.commitments, self._database.now()
        with self._database.begin() as connection:
            asked = _hold_asked(connection, report.transaction_uid)
            if asked is None:
                raise MessageError(INVALID_ARGUMENT, "unknown transaction")
            if asked.destination not in destinations:
                raise MessageError(INVALID_ARGUMENT, "a report of what another destination was asked")
            if asked.answered_at is not None:
                return Noted(asked.job_id)
            answered = {"answered_at": now, "due_at": later(now, asked.pause_seconds)}
            same = table.c.transaction_uid == report.transaction_uid
            connection.execute(update(table).where(same).values(answered))
            committed, failed = _compared(connection, asked, report)
            kept = _note_committed(connection, asked, committed)
            refused = _note_refused(connection, asked, failed) if _is_latest(connection, asked) else 0
            settle(connection, asked.job_id, actor, at=now)
            return Noted(asked.job_id, kept, refused)

    def leave(self, job_id: str, attempt: int, detail: str) -> Job | None:
        """Give a claimed DELIVERED job back; the sweep enqueues it when the next request is due."""
        values, ours = {"lease_until": None, "detail": detail}, schema.jobs.c.attempt == attempt
        with self._database.begin() as connection:
            return touch(connection, job_id, State.DELIVERED, values, ours, at=self._database.now())

    def send_again(self, job_id: str, attempt: int, reason: int, *, actor: str, detail: str) -> Job | None:
        """DELIVERED -> DELIVERING for what was refused for `reason`; the requests made so far go on counting."""
        table, now = schema.deliveries, self._database.now()
        refused = and_(table.c.commitment == CommitmentStatus.REFUSED.value, table.c.failure_reason == reason)
        values = AFRESH | {"detail": detail}
        with self._database.begin() as connection:
            before, to = [State.DELIVERED], State.DELIVERING
            row = swap(connection, job_id, before, to, values, actor=actor, at=now, attempt=attempt)
            if row is None:
                return None
            again = {"status": DeliveryStatus.PENDING.value, **OWED}
            connection.execute(update(table).where(table.c.job_id == job_id, refused).values(again))
        return job_of(row)


def _of(job_id: str) -> Any:
    table = schema.commitments
    return select(table).where(table.c.job_id == job_id).order_by(table.c.asked_at)


def _hold_asked(connection: Connection, transaction_uid: str) -> Row[Any] | None:
    """The request with that Transaction UID, its job held: two answers to one job come one after the other."""
    query = select(schema.commitments).where(schema.commitments.c.transaction_uid == transaction_uid)
    asked = connection.execute(query).one_or_none()
    if asked is None or hold(connection, asked.job_id) is None:
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
    kept = {"commitment": CommitmentStatus.COMMITTED.value, "status": DeliveryStatus.SENT.value}
    for some in batches(sorted(sop_instance_uids)):
        named = and_(_asked_about(asked), table.c.sop_instance_uid.in_(some), table.c.commitment.in_(OPEN_VALUES))
        noted += connection.execute(update(table).where(named).values(**kept, failure_reason=None)).rowcount
    return noted


def _note_refused(connection: Connection, asked: Row[Any], failed: Mapping[str, int]) -> int:
    table, noted = schema.deliveries, 0
    for reason in set(failed.values()):
        for some in batches(sorted(uid for uid, why in failed.items() if why == reason)):
            named = and_(_asked_about(asked), table.c.sop_instance_uid.in_(some))
            wanted = and_(named, table.c.commitment == CommitmentStatus.WANTED.value)
            values = {"commitment": CommitmentStatus.REFUSED.value, "failure_reason": reason}
            noted += connection.execute(update(table).where(wanted).values(values)).rowcount
    return noted


def _is_latest(connection: Connection, asked: Row[Any]) -> bool:
    table = schema.commitments
    same = and_(table.c.job_id == asked.job_id, table.c.destination == asked.destination)
    later_ones = select(table.c.transaction_uid).where(same, table.c.asked_at > asked.asked_at)
    return connection.execute(later_ones.limit(1)).first() is None


def _transaction(row: Row[Any]) -> Transaction:
    return Transaction(row.transaction_uid, row.job_id, row.destination, row.asked_at, row.due_at, row.answered_at)
