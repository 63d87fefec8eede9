"""Asking about one delivered job: which destinations owe their storage commitment, whether it is time, and what then.

Hides the rules of asking again (PS3.4 section J.3.2.1.1: every request is a transaction of its own) and of giving up.
The rows are read once, with the claim. Must never send a request that is not noted, and never ask a destination again
that says that asking will not help.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from service.core.dicom.commitment import Reference, Report
from service.core.dicom.status import (
    CLASS_INSTANCE_CONFLICT,
    COMMITMENT_TEXT,
    NO_SUCH_OBJECT_INSTANCE,
    SOP_CLASS_NOT_SUPPORTED,
    in_words,
)
from service.core.errors import Permanent, Reason, Retryable
from service.core.ledger import ClaimedCommitment, Delivery, Ledger, Transaction
from service.core.retry import asking
from service.core.settings import Destination, Settings
from service.core.telemetry import Log
from worker.deliver.committing import request_commitment
from worker.deliver.outbox import destination_called
from worker.lease import Lease, SupersededError

LOG = Log("worker")
REFUSED_FOR_GOOD = {CLASS_INSTANCE_CONFLICT, SOP_CLASS_NOT_SUPPORTED}
LOOK_SECONDS = 1.0  # for an answer that came on another association, which only the ledger knows of


@dataclass(frozen=True)
class Inquiry:
    """One claimed job whose destinations are asked.

    `clock` is the ledger's; `actor` stands in the history for what was answered on our own association.
    """

    settings: Settings
    ledger: Ledger
    claimed: ClaimedCommitment
    lease: Lease
    actor: str
    clock: Callable[[], datetime]
    rng: random.Random

    def ask_all(self) -> str:
        """Ask every destination that owes one, if this is its moment, whatever the others say.

        Returns:
            How things stand, in words; empty when nobody owes anything any more.

        Raises:
            SupersededError: the job is no longer ours, or is being sent again.
            Permanent: COMMITMENT_REFUSED or COMMITMENT_TIMEOUT, what the first hopeless destination said.
        """
        said, hopeless = [], []
        for name in sorted({row.destination for row in self.claimed.deliveries if row.is_open}):
            try:
                said.append(self._ask_when_due(name))
            except Permanent as error:
                hopeless.append(error)
        if hopeless:
            raise hopeless[0]
        return "; ".join(filter(None, said))

    def _ask_when_due(self, name: str) -> str:
        owed = [row for row in self.claimed.deliveries if row.destination == name and row.is_open]
        asked = [item for item in self.claimed.transactions if item.destination == name]
        begun, times, left = asked[0].asked_at if asked else self.clock(), len(asked), len(owed)
        if not asked or asked[-1].due_at <= self.clock():
            self._refuse_hopeless(name, owed, asked)
            left, times = self._ask(destination_called(name, self.settings), owed, times + 1), times + 1
        if not left:
            return ""
        until = f"until {self._limit(begun):%Y-%m-%d %H:%M} UTC"
        return f"{name}: storage commitment of {left} instances asked for {times} times, {until}"

    def _refuse_hopeless(self, name: str, owed: Sequence[Delivery], asked: Sequence[Transaction]) -> None:
        """Send again what the destination says it does not have; give up where asking again will not help."""
        reasons = {row.failure_reason for row in owed if row.failure_reason is not None}
        refused = ", ".join(in_words(reason, COMMITMENT_TEXT) for reason in sorted(reasons))
        is_over = bool(asked) and self.clock() >= self._limit(asked[0].asked_at)
        if reasons & REFUSED_FOR_GOOD or (reasons and is_over):
            raise Permanent(Reason.COMMITMENT_REFUSED, f"{name}: {len(owed)} instances not committed: {refused}")
        if is_over:
            raise Permanent(Reason.COMMITMENT_TIMEOUT, f"{name}: asked {len(asked)} times about {len(owed)} instances")
        if NO_SUCH_OBJECT_INSTANCE in reasons:
            job, detail = self.claimed.job, f"{name} took instances and does not have them; they are sent again"
            LOG.warning("committing failed: sent again", job_id=job.id, destination=name)
            self.ledger.commitments.send_again(
                job.id, job.attempt, NO_SUCH_OBJECT_INSTANCE, actor=self.actor, detail=detail
            )
            raise SupersededError

    def _ask(self, destination: Destination, owed: Sequence[Delivery], times: int) -> int:
        """One request in a new transaction, noted before it is sent. Returns how many instances are still owed."""
        job, name = self.claimed.job, destination.name
        transaction_uid = f"2.25.{uuid.uuid4().int}"
        pause_seconds = asking(self.settings).pause(times, self.rng).total_seconds()
        if not self.ledger.commitments.ask(job.id, job.attempt, name, transaction_uid, pause_seconds):
            raise SupersededError
        LOG.info("asking for storage commitment", job_id=job.id, destination=name, count=len(owed))
        reply = _Reply(self.ledger, transaction_uid, destination, self.actor)
        references = [Reference(row.sop_class_uid, row.sop_instance_uid) for row in owed]
        try:
            request_commitment(
                transaction_uid, references, destination, reply.take, lambda: self.lease.is_lost or reply.is_there()
            )
        except Retryable as error:
            LOG.warning("not asked for storage commitment", job_id=job.id, reason=error.reason.name)
        else:
            if not reply.is_known:
                self.ledger.commitments.give_time(transaction_uid, self.settings.commitment_timeout_seconds)
        if reply.is_known_elsewhere:
            rows = self.ledger.deliveries.of_job(job.id)
            return sum(row.destination == name and row.is_open for row in rows)
        return len(owed) - reply.committed

    def _limit(self, first_asked_at: datetime) -> datetime:
        """The moment from which a destination is not asked again."""
        return first_asked_at + timedelta(seconds=self.settings.commitment_limit_seconds)


class _Reply:
    """The answer to one request, on whichever association it comes."""

    def __init__(self, ledger: Ledger, transaction_uid: str, destination: Destination, actor: str) -> None:
        self._ledger, self._transaction_uid = ledger, transaction_uid
        self._destination, self._actor = destination, actor
        self._taken, self._looked_at = threading.Event(), time.monotonic()
        self.is_known_elsewhere = False
        self.committed = 0

    @property
    def is_known(self) -> bool:
        """Whether it has come, as far as we have heard."""
        return self._taken.is_set() or self.is_known_elsewhere

    def take(self, report: Report) -> None:
        """A report that came on our own association to the destination, which speaks for itself alone.

        Raises:
            MessageError: it tells of something that the destination was not asked.
            LedgerError: it could not be noted.
        """
        noted = self._ledger.commitments.answer(report, {self._destination.name}, actor=self._actor)
        if report.transaction_uid == self._transaction_uid:
            self.committed = noted.committed
            self._taken.set()

    def is_there(self) -> bool:
        """Whether there is nothing more to wait for. The ledger is asked now and then."""
        now = time.monotonic()
        if not self.is_known and now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            transaction = self._ledger.commitments.get(self._transaction_uid)
            self.is_known_elsewhere = transaction is None or transaction.answered_at is not None
        return self.is_known
