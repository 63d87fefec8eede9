"""How much of its study a job was made from, and which later job saw more.

Frozen: a change of the schema is a new file beside this one. Must never import `ledger.schema`, which moves on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"


def upgrade() -> None:
    """Add the columns. Jobs that exist count as made from as little as possible: any later one supersedes them."""
    op.add_column("jobs", sa.Column("considered", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("superseded_by", sa.String(32)))


def downgrade() -> None:
    """Drop the columns."""
    for name in ("superseded_by", "considered"):
        op.drop_column("jobs", name)
