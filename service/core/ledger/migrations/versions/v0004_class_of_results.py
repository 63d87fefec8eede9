"""The SOP class of every result instance, so that a report of storage commitment can be compared with what was sent.

Stop the workers of the version before first: what they insert meanwhile has no class, and no report can fit it.

Frozen: a change of the schema is a new file beside this one. Must never import `ledger.schema`, which moves on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"

MR_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
STORED_AS = {
    "sd": MR_IMAGE_STORAGE,
    "sd_plus": MR_IMAGE_STORAGE,
    "subtraction": MR_IMAGE_STORAGE,
    "parametric_map": "1.2.840.10008.5.1.4.1.1.30",
    "segmentation": "1.2.840.10008.5.1.4.1.1.66.4",
    "structured_report": "1.2.840.10008.5.1.4.1.1.88.33",
    "presentation_state": "1.2.840.10008.5.1.4.1.1.11.1",
}


def upgrade() -> None:
    """Until now the kind of a result said its class."""
    op.add_column("deliveries", sa.Column("sop_class_uid", sa.String(64), nullable=False, server_default=sa.text("''")))
    deliveries = sa.table("deliveries", sa.column("kind"), sa.column("sop_class_uid"))
    for kind, uid in STORED_AS.items():
        op.execute(deliveries.update().where(deliveries.c.kind == kind).values(sop_class_uid=uid))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("deliveries", "sop_class_uid")
