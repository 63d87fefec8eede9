"""Storage commitment: what destinations committed themselves to, and what others asked of us.

Frozen: a change of the schema is a new file beside this one. Must never import `ledger.schema`, which moves on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision: str | None = "0002"

MOMENT = sa.DateTime(timezone=True)
UID = sa.String(64)


def upgrade() -> None:
    """Nothing that was delivered so far was asked about."""
    op.add_column(
        "deliveries", sa.Column("commitment", sa.String(16), nullable=False, server_default=sa.text("'NONE'"))
    )
    op.add_column("deliveries", sa.Column("failure_reason", sa.Integer()))
    op.create_table(
        "commitments",
        sa.Column("transaction_uid", UID, primary_key=True),
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("destination", sa.String(64), nullable=False),
        sa.Column("asked_at", MOMENT, nullable=False),
        sa.Column("pause_seconds", sa.Float(), nullable=False),
        sa.Column("due_at", MOMENT, nullable=False),
        sa.Column("answered_at", MOMENT),
    )
    op.create_index("ix_commitments_job_id", "commitments", ["job_id"])
    op.create_table(
        "commitment_requests",
        sa.Column("ae_title", sa.String(16), primary_key=True),
        sa.Column("transaction_uid", UID, primary_key=True),
        sa.Column("referenced", sa.JSON(), nullable=False),
        sa.Column("received_at", MOMENT, nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("due_at", MOMENT),
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("commitment_requests")
    op.drop_table("commitments")
    for name in ("failure_reason", "commitment"):
        op.drop_column("deliveries", name)
