"""The tables of the ledger, as SQLAlchemy sees them.

Hides column types and the two databases' differences in keeping time. `migrations` holds the history of the same
tables; a test compares both. Must never hold patient data: rows carry DICOM UIDs, digests, geometry and times.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)

UID_LENGTH = 64  # PS3.5 section 9.1


class Utc(TypeDecorator[datetime]):
    """A moment: timezone-aware UTC on our side. SQLite forgets the zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002  signature of SQLAlchemy
        """To the database.

        Raises:
            ValueError: the moment has no timezone.
        """
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a moment without timezone cannot be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002  signature of SQLAlchemy
        """From the database."""
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("study_uid", String(UID_LENGTH), nullable=False, index=True),
    Column("state", String(16), nullable=False),
    Column("previous_state", String(16)),  # what the last compare-and-set found; feeds `transitions`
    Column("options", JSON, nullable=False),
    Column("options_hash", String(64), nullable=False),
    Column("input_hash", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),  # fencing token: grows with every claim and re-send, never reset
    Column("tries", Integer, nullable=False),  # claims since a person last asked: what max_attempts counts
    Column("created_at", Utc, nullable=False),
    Column("updated_at", Utc, nullable=False),
    Column("stage", String(16)),
    Column("progress", Float, nullable=False),
    Column("reason", String(64)),
    Column("detail", Text, nullable=False),
    Column("source", String(64), nullable=False),
    Column("report", JSON, nullable=False),
    Column("worker", String(128)),
    Column("lease_until", Utc),  # a live lease: nobody else may work on the job
    Column("due_at", Utc),  # backing off: not before this moment
    Column("enqueued_at", Utc),  # when a message was last handed to the broker
    Column("considered", Integer, nullable=False, server_default=text("0")),  # instances of the study it was made from
    Column("superseded_by", String(32)),  # the job that was made when more of the study had arrived
    UniqueConstraint("input_hash", "options_hash", name="one_job_per_input_and_options"),
    Index("jobs_by_state", "state", "created_at"),
    Index("jobs_by_age", "created_at", "id"),
)

instances = Table(
    "instances",
    metadata,
    Column("sop_instance_uid", String(UID_LENGTH), primary_key=True),
    Column("study_uid", String(UID_LENGTH), nullable=False, index=True),
    Column("series_uid", String(UID_LENGTH), nullable=False),
    Column("sop_class_uid", String(UID_LENGTH), nullable=False),
    Column("transfer_syntax_uid", String(UID_LENGTH), nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("size", BigInteger, nullable=False),
    Column("received_at", Utc, nullable=False),
    Column("source", String(64), nullable=False),
    Column("summary", JSON, nullable=False),
    Column("job_id", String(32), ForeignKey("jobs.id"), index=True),  # the latest job that covers it; NULL: waiting
)

job_inputs = Table(
    "job_inputs",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id"), primary_key=True),
    Column("sop_instance_uid", String(UID_LENGTH), primary_key=True),
)

transitions = Table(
    "transitions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", String(32), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("at", Utc, nullable=False),
    Column("from_state", String(16)),
    Column("to_state", String(16), nullable=False),
    Column("actor", String(128), nullable=False),
    Column("reason", String(64)),
    Column("detail", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id"), primary_key=True),
    Column("destination", String(64), primary_key=True),
    Column("sop_instance_uid", String(UID_LENGTH), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("path", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("dimse_status", Integer),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("last_error", Text, nullable=False, server_default=text("''")),
    Column("updated_at", Utc, nullable=False),
    Column("commitment", String(16), nullable=False, server_default=text("'NONE'")),
    Column("failure_reason", Integer),  # PS3.3 C.14.1.1, where the destination does not commit itself
    Column("sop_class_uid", String(UID_LENGTH), nullable=False, server_default=text("''")),
)

commitments = Table(  # what we asked destinations to commit themselves to
    "commitments",
    metadata,
    Column("transaction_uid", String(UID_LENGTH), primary_key=True),
    Column("job_id", String(32), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("destination", String(64), nullable=False),
    Column("asked_at", Utc, nullable=False),
    Column("pause_seconds", Float, nullable=False),  # before the next request, if this one is answered with failures
    Column("due_at", Utc, nullable=False),  # the moment of the next request, as things stand
    Column("answered_at", Utc),
)

commitment_requests = Table(  # what others asked us to commit ourselves to
    "commitment_requests",
    metadata,
    Column("ae_title", String(16), primary_key=True),
    Column("transaction_uid", String(UID_LENGTH), primary_key=True),
    Column("referenced", JSON, nullable=False),  # [SOP class UID, SOP instance UID] each
    Column("received_at", Utc, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("due_at", Utc),  # when the report is sent, or tried again; NULL: it was answered or given up
)
