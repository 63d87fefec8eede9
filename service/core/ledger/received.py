"""The book of what has arrived: one row for each DICOM object whose bytes lie in the spool.

Guarantees: a row that was answered for is durable; of several senders of one object exactly one is told that it is new;
the first object under a SOPInstanceUID is never replaced by another. Must never hold more of a header than identifiers
and the summary (`service.core.dicom.series.HeaderSummary`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, Protocol

from sqlalchemy import Connection, Row, func, select, update

from service.core.ledger import schema
from service.core.ledger.database import Database, batches, insert_new


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
    source: str  # see service.core.actor
    summary: dict[str, Any] = field(default_factory=dict)  # service.core.dicom.series.HeaderSummary as JSON


@dataclass(frozen=True)
class WaitingStudy:
    """A study with instances that no job covers yet."""

    study_uid: str
    last_received_at: datetime
    instances: int  # all instances of the study, covered or not


class Received:
    """See the head of this module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, instance: Instance) -> Added:
        """Note an instance whose bytes are already durable. Durable itself when this returns."""
        table = schema.instances
        with self._database.begin() as connection:
            if insert_new(connection, table, [asdict(instance)]):
                return Added.NEW
            query = select(table).where(table.c.sop_instance_uid == instance.sop_instance_uid)
            known = instance_of(connection.execute(query).one())
        return Added.DUPLICATE if _same_object(known, instance) else Added.CONFLICT

    def get(self, sop_instance_uid: str) -> Instance | None:
        """What was received under that UID, if anything."""
        table = schema.instances
        rows = self._database.read(select(table).where(table.c.sop_instance_uid == sop_instance_uid))
        return instance_of(rows[0]) if rows else None

    def of_study(self, study_uid: str) -> list[Instance]:
        """Everything received of one study, oldest first."""
        table = schema.instances
        query = select(table).where(table.c.study_uid == study_uid)
        rows = self._database.read(query.order_by(table.c.received_at, table.c.sop_instance_uid))
        return [instance_of(row) for row in rows]

    def conflicts(self, arriving: Sequence[Identified]) -> int:
        """How many of these would be a CONFLICT, with what is known, in whatever study, or with each other."""
        table, known = schema.instances, dict[str, Identified]()
        uids = sorted({item.sop_instance_uid for item in arriving})
        for some in batches(uids):
            rows = self._database.read(select(table).where(table.c.sop_instance_uid.in_(some)))
            known |= {row.sop_instance_uid: instance_of(row) for row in rows}
        return sum(not _same_object(known.setdefault(item.sop_instance_uid, item), item) for item in arriving)

    def waiting(self) -> list[WaitingStudy]:
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
        return [WaitingStudy(row.study_uid, row.last, row.total) for row in self._database.read(query)]

    def holds(self, sha256: str) -> bool:
        """Whether an instance with these bytes is known; what the spool's janitor asks."""
        table = schema.instances
        return bool(self._database.read(select(table.c.sha256).where(table.c.sha256 == sha256).limit(1)))


def stop_waiting(connection: Connection, job_id: str, sop_instance_uids: Sequence[str]) -> None:
    """The job covers these instances, inside the transaction that makes it."""
    table = schema.instances
    for some in batches(sop_instance_uids):
        connection.execute(update(table).where(table.c.sop_instance_uid.in_(some)).values(job_id=job_id))


def instance_of(row: Row[Any]) -> Instance:
    """A stored instance."""
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


def _same_object(known: Identified, other: Identified) -> bool:
    """Bytes decide; in another transfer syntax the bytes must differ, and the UIDs have to be believed (PS3.5 9)."""
    if known.sha256 == other.sha256:
        return True
    same_place = (known.study_uid, known.series_uid) == (other.study_uid, other.series_uid)
    return same_place and known.transfer_syntax_uid != other.transfer_syntax_uid
