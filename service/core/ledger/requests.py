"""The book of what others ask us to keep (storage commitment as SCP, PS3.4 annex J).

Guarantees: a request is durable before it is answered for; a transaction never comes to mean other instances; of
several who report, one gets a request, and it comes back to the others when that one dies. Must never say what is safe:
that takes a look at the bytes, and is `service.dicom.commitment`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update

from service.core.dicom.commitment import Reference, Request
from service.core.ledger import schema
from service.core.ledger.database import Database, insert_new
from service.core.ledger.states import later


@dataclass(frozen=True)
class CommitmentRequest:
    """One request for storage commitment that somebody made of us and that is to be answered."""

    ae_title: str
    transaction_uid: str
    references: tuple[Reference, ...]
    tries: int


class Requests:
    """See the head of this module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, ae_title: str, request: Request) -> bool:
        """Note what somebody asks us to keep. Durable when this returns; the same request again is answered again.

        Returns:
            False when this transaction is known with other instances.
        """
        table, now = schema.commitment_requests, self._database.now()
        referenced = sorted([item.sop_class_uid, item.sop_instance_uid] for item in request.references)
        row: dict[str, Any] = {"ae_title": ae_title, "transaction_uid": request.transaction_uid}
        row |= {"referenced": referenced, "received_at": now, "tries": 0, "due_at": now}
        same = (table.c.ae_title == ae_title) & (table.c.transaction_uid == request.transaction_uid)
        with self._database.begin() as connection:
            if insert_new(connection, table, [row]):
                return True
            known = connection.execute(select(table.c.referenced).where(same)).scalar_one()
            if sorted(known) != referenced:
                return False
            given_up = same & table.c.due_at.is_(None)
            connection.execute(update(table).where(given_up).values(due_at=now, tries=0))
        return True

    def claim(self, lease_seconds: float) -> CommitmentRequest | None:
        """The request that has waited longest for its report; nobody else gets it for so many seconds."""
        table, now = schema.commitment_requests, self._database.now()
        query = select(table).where(table.c.due_at <= now).order_by(table.c.due_at).limit(1)
        for row in self._database.read(query):
            same = (table.c.ae_title == row.ae_title) & (table.c.transaction_uid == row.transaction_uid)
            values = {"due_at": later(now, lease_seconds), "tries": table.c.tries + 1}
            change = update(table).where(same, table.c.due_at == row.due_at).values(values)
            with self._database.begin() as connection:
                if connection.execute(change).rowcount:
                    references = tuple(Reference(*pair) for pair in row.referenced)
                    return CommitmentRequest(row.ae_title, row.transaction_uid, references, row.tries + 1)
        return None

    def settle(self, request: CommitmentRequest, due_at: datetime | None) -> None:
        """Report it again at `due_at`; None: it is done with."""
        table = schema.commitment_requests
        same = (table.c.ae_title == request.ae_title) & (table.c.transaction_uid == request.transaction_uid)
        with self._database.begin() as connection:
            connection.execute(update(table).where(same).values(due_at=due_at))

    def overdue(self, seconds: float) -> int:
        """How many requests have been due for longer than that: nobody reports."""
        table, since = schema.commitment_requests, later(self._database.now(), -seconds)
        query = select(func.count()).select_from(table).where(table.c.due_at <= since)
        return int(self._database.read(query)[0][0])
