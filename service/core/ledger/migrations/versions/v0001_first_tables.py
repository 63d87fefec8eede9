"""The first tables: jobs, instances, job inputs, transitions, deliveries.

Frozen: a change of the schema is a new file beside this one. Must never import `ledger.schema`, which moves on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None

MOMENT = sa.DateTime(timezone=True)
UID = sa.String(64)


def upgrade() -> None:
    """Create everything."""
    _jobs()
    _instances()
    op.create_table(
        "job_inputs",
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("sop_instance_uid", UID, primary_key=True),
    )
    _transitions()
    _deliveries()


def downgrade() -> None:
    """Drop everything."""
    for name in ("deliveries", "transitions", "job_inputs", "instances", "jobs"):
        op.drop_table(name)


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("study_uid", UID, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("previous_state", sa.String(16)),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("options_hash", sa.String(64), nullable=False),
        sa.Column("input_hash", sa.String(64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.Column("stage", sa.String(16)),
        sa.Column("progress", sa.Float(), nullable=False),
        sa.Column("reason", sa.String(64)),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("source", sa.String(64), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("worker", sa.String(128)),
        sa.Column("lease_until", MOMENT),
        sa.Column("due_at", MOMENT),
        sa.Column("enqueued_at", MOMENT),
        sa.UniqueConstraint("input_hash", "options_hash", name="one_job_per_input_and_options"),
    )
    op.create_index("ix_jobs_study_uid", "jobs", ["study_uid"])
    op.create_index("jobs_by_age", "jobs", ["created_at", "id"])
    op.create_index("jobs_by_state", "jobs", ["state", "created_at"])


def _instances() -> None:
    op.create_table(
        "instances",
        sa.Column("sop_instance_uid", UID, primary_key=True),
        sa.Column("study_uid", UID, nullable=False),
        sa.Column("series_uid", UID, nullable=False),
        sa.Column("sop_class_uid", UID, nullable=False),
        sa.Column("transfer_syntax_uid", UID, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("received_at", MOMENT, nullable=False),
        sa.Column("source", sa.String(64), nullable=False),
        sa.Column("summary", sa.JSON(), nullable=False),
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id")),
    )
    op.create_index("ix_instances_job_id", "instances", ["job_id"])
    op.create_index("ix_instances_sha256", "instances", ["sha256"])
    op.create_index("ix_instances_study_uid", "instances", ["study_uid"])


def _transitions() -> None:
    op.create_table(
        "transitions",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("from_state", sa.String(16)),
        sa.Column("to_state", sa.String(16), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("reason", sa.String(64)),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
    )
    op.create_index("ix_transitions_job_id", "transitions", ["job_id"])


def _deliveries() -> None:
    op.create_table(
        "deliveries",
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("destination", sa.String(64), primary_key=True),
        sa.Column("sop_instance_uid", UID, primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("dimse_status", sa.Integer()),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("last_error", sa.Text(), nullable=False, server_default=sa.text("''")),
        sa.Column("updated_at", MOMENT, nullable=False),
    )
