"""The task `deliver`: what a DELIVERING job has to send is sent, and who owes storage commitment of it is asked.

Hides the two halves, each with a claim of its own: sending ends in DELIVERED, and from then on destinations are asked,
again and again, until they have committed themselves (PS3.4 annex J). Must never work on a job without its claim, and
never leave one destination out because another failed.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.core.errors import Permanent, Retryable
from service.core.job import Job, Stage, State
from service.core.ledger import ClaimedDelivery, Ledger
from service.core.settings import Settings
from service.core.spool import Spool
from worker.attempt import Attempts
from worker.deliver.inquiry import Inquiry
from worker.deliver.outbox import Outbox, destination_called
from worker.deliver.sending import send
from worker.lease import Lease, SupersededError


@dataclass(frozen=True)
class Deliverer:
    """Sends results, one job after the other."""

    settings: Settings
    ledger: Ledger
    spool: Spool
    attempts: Attempts

    def deliver(self, job_id: str) -> None:
        """Send what a DELIVERING job still has to send, and ask for storage commitment where that is due."""
        claimed = self.ledger.deliveries.claim(job_id, self.attempts.actor, self.settings.lease_seconds)
        if claimed is None:
            self._ask(job_id)
            return
        done = self._send(claimed)
        if done is not None and done.state is State.DELIVERED and done.due_at is not None:
            self._ask(job_id)

    def _send(self, claimed: ClaimedDelivery) -> Job | None:
        """The job, if everything was sent."""
        job, done = claimed.job, None
        with self.attempts.at(job) as lease:
            outbox = Outbox(self.ledger, claimed, self.spool.result_dir(job.id))
            lease.progress(Stage.DELIVER, outbox.fraction)
            troubles = [trouble for name in outbox.destinations if (trouble := self._send_to(name, outbox, lease))]
            outbox.conclude(troubles)
            actor, committing = self.attempts.actor, self.settings.committing
            done = self.ledger.deliveries.finish(job.id, job.attempt, actor=actor, committing=committing)
            if done is None:
                raise SupersededError
        return done

    def _send_to(self, name: str, outbox: Outbox, lease: Lease) -> Retryable | Permanent | None:
        """Send to one destination and note every answer; the trouble that ended it early, if any."""
        try:
            for answer in send(outbox.files_for(name), destination_called(name, self.settings)):
                outbox.note(name, answer)
                lease.progress(Stage.DELIVER, outbox.fraction)
        except Permanent as error:
            outbox.refuse(name, error.detail)
            return error
        except Retryable as error:
            return Retryable(error.reason, f"{name}: {error.detail}")
        return None

    def _ask(self, job_id: str) -> None:
        seconds, committing = self.settings.lease_seconds, self.settings.committing
        claimed = self.ledger.commitments.claim(job_id, self.attempts.actor, seconds, committing)
        if claimed is None:
            return
        with self.attempts.at(claimed.job) as lease:
            shared = self.attempts
            inquiry = Inquiry(
                self.settings, self.ledger, claimed, lease, actor=shared.actor, clock=shared.clock, rng=shared.rng
            )
            if said := inquiry.ask_all():
                self.ledger.commitments.leave(job_id, claimed.job.attempt, said)
