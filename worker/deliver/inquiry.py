"""Asking about one delivered job: which destinations owe their storage commitment, whether it is time, and what then.

Hides the rules of asking again (PS3.4 section J.3.2.1.1: every request is a transaction of its own) and of giving up.
The rows come with the claim, and are read again after each wait, in which anybody may have answered. Must never send a
request that is not noted, and never ask a destination again that says that asking will not help.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
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
from service.core.ledger import ClaimedCommitment, Delivery, Ledger
from service.core.retry import asking
from service.core.settings import Destination, Settings
from service.core.telemetry import Log
from worker.deliver.committing import request_commitment
from worker.deliver.outbox import destination_called
from worker.lease import Lease, SupersededError

LOG = Log("worker")
REFUSED_FOR_GOOD = {CLASS_INSTANCE_CONFLICT, SOP_CLASS_NOT_SUPPORTED}
LOOK_SECONDS = 1.0  # for an answer that came on another association, which only the ledger knows of


class Inquiry:
    """One claimed job whose destinations are asked.

    Args:
        settings: how long, and how often.
        ledger: where requests and answers are noted.
        claimed: the job, its rows, and the requests until now.
        lease: on the job.
        actor: stands in the history for what was answered on our own association.
        clock: the ledger's.
        rng: for the pauses.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        claimed: ClaimedCommitment,
        lease: Lease,
        *,
        actor: str,
        clock: Callable[[], datetime],
        rng: random.Random,
    ) -> None:
        self._settings, self._ledger, self._lease = settings, ledger, lease
        self._actor, self._now, self._rng = actor, clock(), rng
        self._job, self._rows = claimed.job, claimed.deliveries
        self._asked_at: dict[str, list[datetime]] = {}
        self._due_at: dict[str, datetime] = {}
        for item in claimed.transactions:
            self._asked_at.setdefault(item.destination, []).append(item.asked_at)
            self._due_at[item.destination] = item.due_at  # of the latest one

    def ask_all(self) -> str:
        """Ask every destination that owes one, if this is its moment, whatever the others say.

        Returns:
            How things stand, in words; empty when nobody owes anything any more.

        Raises:
            SupersededError: the job is no longer ours, or is being sent again.
            Permanent: COMMITMENT_REFUSED or COMMITMENT_TIMEOUT, what the first hopeless destination said.
        """
        hopeless = dict[str, Permanent]()
        for name in self._due():  # judged before anybody is waited for
            try:
                self._refuse_hopeless(name, self._owed(name))
            except Permanent as error:
                hopeless[name] = error
        for name in [name for name in self._due() if name not in hopeless]:
            if owed := self._owed(name):
                try:
                    self._refuse_hopeless(name, owed)  # it may have refused for good while another was waited for
                    self._ask(destination_called(name, self._settings), owed)
                except Permanent as error:
                    hopeless[name] = error
                self._rows = self._ledger.deliveries.of_job(self._job.id)  # any of them may have answered meanwhile
        for name in sorted(hopeless):
            if self._owed(name):
                raise hopeless[name]
        return "; ".join(self._standing(name) for name in self._owing())

    def _owing(self) -> list[str]:
        return sorted({row.destination for row in self._rows if row.is_open})

    def _owed(self, name: str) -> list[Delivery]:
        return [row for row in self._rows if row.destination == name and row.is_open]

    def _due(self) -> list[str]:
        return [name for name in self._owing() if self._due_at.get(name, self._now) <= self._now]

    def _standing(self, name: str) -> str:
        asked_at, left = self._asked_at.get(name, [self._now]), len(self._owed(name))
        until = f"until {self._limit(asked_at[0]):%Y-%m-%d %H:%M} UTC"
        return f"{name}: storage commitment of {left} instances asked for {len(asked_at)} times, {until}"

    def _refuse_hopeless(self, name: str, owed: Sequence[Delivery]) -> None:
        """Send again what the destination says it does not have; give up where asking again will not help."""
        reasons = {row.failure_reason for row in owed if row.failure_reason is not None}
        refused = ", ".join(in_words(reason, COMMITMENT_TEXT) for reason in sorted(reasons))
        asked_at = self._asked_at.get(name, [])
        is_over = bool(asked_at) and self._now >= self._limit(asked_at[0])
        if reasons & REFUSED_FOR_GOOD or (reasons and is_over):
            raise Permanent(Reason.COMMITMENT_REFUSED, f"{name}: {len(owed)} instances not committed: {refused}")
        if is_over:
            times = len(asked_at)
            raise Permanent(Reason.COMMITMENT_TIMEOUT, f"{name}: asked {times} times about {len(owed)} instances")
        if NO_SUCH_OBJECT_INSTANCE in reasons:
            job, detail = self._job, f"{name} took instances and does not have them; they are sent again"
            LOG.warning("committing failed: sent again", job_id=job.id, destination=name)
            self._ledger.commitments.send_again(
                job.id, job.attempt, NO_SUCH_OBJECT_INSTANCE, actor=self._actor, detail=detail
            )
            raise SupersededError

    def _ask(self, destination: Destination, owed: Sequence[Delivery]) -> None:
        """One request in a new transaction, noted before it is sent.

        Raises:
            SupersededError: the job is no longer ours.
            Permanent: COMMITMENT_REFUSED, it will not take the request.
        """
        job, name, transaction_uid = self._job, destination.name, f"2.25.{uuid.uuid4().int}"
        asked_at = self._asked_at.setdefault(name, [])
        asked_at.append(self._now)
        pause_seconds = asking(self._settings).pause(len(asked_at), self._rng).total_seconds()
        if not self._ledger.commitments.ask(job.id, job.attempt, name, transaction_uid, pause_seconds):
            raise SupersededError
        LOG.info("asking for storage commitment", job_id=job.id, destination=name, count=len(owed))
        reply = _Reply(self._ledger, transaction_uid, name, self._actor)
        references = [Reference(row.sop_class_uid, row.sop_instance_uid) for row in owed]
        try:
            request_commitment(
                transaction_uid, references, destination, reply.take, lambda: self._lease.is_lost or reply.is_there()
            )
        except Retryable as error:
            LOG.warning("not asked for storage commitment", job_id=job.id, reason=error.reason.name)
            return
        if not reply.is_known:
            self._ledger.commitments.give_time(transaction_uid, self._settings.commitment_timeout_seconds)

    def _limit(self, first_asked_at: datetime) -> datetime:
        """The moment from which a destination is not asked again."""
        return first_asked_at + timedelta(seconds=self._settings.commitment_limit_seconds)


class _Reply:
    """The answer to one request, on whichever association it comes."""

    def __init__(self, ledger: Ledger, transaction_uid: str, destination: str, actor: str) -> None:
        self._ledger, self._transaction_uid = ledger, transaction_uid
        self._destination, self._actor = destination, actor
        self._known, self._looked_at = threading.Event(), time.monotonic()

    @property
    def is_known(self) -> bool:
        """Whether it has come, as far as we have heard."""
        return self._known.is_set()

    def take(self, report: Report) -> None:
        """A report that came on our own association to the destination, which speaks for itself alone.

        Raises:
            MessageError: it tells of something that the destination was not asked.
            LedgerError: it could not be noted.
        """
        self._ledger.commitments.answer(report, {self._destination}, actor=self._actor)
        if report.transaction_uid == self._transaction_uid:
            self._known.set()

    def is_there(self) -> bool:
        """Whether there is nothing more to wait for. The ledger is asked now and then."""
        now = time.monotonic()
        if not self.is_known and now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            transaction = self._ledger.commitments.get(self._transaction_uid)
            if transaction is None or transaction.answered_at is not None:
                self._known.set()
        return self.is_known
