"""The ledger: what has arrived, which jobs exist, where each stands and why. The truth; queues only carry ids.

Hides SQL: no other module issues it or knows SQLAlchemy. The floors, from below: `schema` has the tables, `database`
the connections, the clock and the errors, `states` the one compare-and-set with its history; above it stand the books,
each of which says what it guarantees: `received`, `deliveries`, `commitments` (what we ask of destinations), `requests`
(what others ask of us), `jobs`, and `retention`, which forgets out of all of them. `Ledger` only joins them. Must never
be written around, and never hold patient data.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Self

from service.core.ledger.commitments import ClaimedCommitment, Commitments, Noted, Transaction
from service.core.ledger.database import Database, LedgerError, LedgerUnavailableError, kind_of
from service.core.ledger.deliveries import ClaimedDelivery, CommitmentStatus, Deliveries, Delivery, DeliveryStatus
from service.core.ledger.jobs import Jobs
from service.core.ledger.received import Added, Instance, Received, WaitingStudy
from service.core.ledger.requests import CommitmentRequest, Requests
from service.core.ledger.retention import Retention
from service.core.ledger.states import Transition

__all__ = [
    "Added",
    "ClaimedCommitment",
    "ClaimedDelivery",
    "CommitmentRequest",
    "CommitmentStatus",
    "Delivery",
    "DeliveryStatus",
    "Instance",
    "Ledger",
    "LedgerError",
    "LedgerUnavailableError",
    "Noted",
    "Transaction",
    "Transition",
    "WaitingStudy",
    "kind_of",
]


class Ledger:
    """An open ledger. Safe to share between threads; every process opens its own."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.received = Received(database)
        self.jobs = Jobs(database)
        self.deliveries = Deliveries(database)
        self.commitments = Commitments(database)
        self.requests = Requests(database)
        self.retention = Retention(database)

    @classmethod
    def open(cls, url: str, clock: Callable[[], datetime] | None = None) -> Ledger:
        """Connect and bring the tables up to date; several processes may do so at the same time.

        Args:
            url: of SQLAlchemy.
            clock: for tests. Unset: the database's, so that machines whose own clocks disagree still agree on leases.

        Raises:
            LedgerError: the database cannot be reached, or its tables cannot be brought up to date.
            OSError: the file or its folder cannot be made.
        """
        return cls(Database.open(url, clock))

    def close(self) -> None:
        """Give back the connections."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def now(self) -> datetime:
        """The present moment, by the clock that all moments in the ledger are compared with."""
        return self._database.now()

    def ping(self) -> None:
        """Ask the database for one row.

        Raises:
            LedgerUnavailableError: the database cannot be reached.
        """
        self._database.ping()
