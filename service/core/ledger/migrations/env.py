"""Runs the migrations over the connection that `service.core.ledger` hands in, inside its transaction."""

from __future__ import annotations

from alembic import context

from service.core.ledger.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
