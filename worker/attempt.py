"""One attempt at a claimed job, and the task boundary: whatever goes wrong in it becomes the job's next state.

Hides what each kind of failure does to a job: back off, end with a named reason, or stop in silence because the job is
somebody else's by now. Every change is fenced by the attempt number. Must never let an error leave a job RUNNING, and
never quote the words of an unexpected error, which may hold what was sent to us.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from service.core import retry
from service.core.errors import Permanent, Reason, Retryable
from service.core.job import STATE_OF_OUTCOME, Job, State
from service.core.ledger import Ledger, LedgerUnavailableError, kind_of
from service.core.settings import Settings
from service.core.telemetry import Log
from worker.lease import Lease, SupersededError

LOG = Log("worker")


@dataclass(frozen=True)
class Attempts:
    """What the attempts of one worker have in common."""

    settings: Settings
    ledger: Ledger
    actor: str  # the worker's name, for leases and history
    clock: Callable[[], datetime]  # the ledger's
    rng: random.Random

    @contextmanager
    def at(self, job: Job) -> Iterator[Lease]:
        """Hold a job, in the state in which it was claimed, until the block ends.

        No error leaves the block, except where it cannot be noted: then the lease runs out, and the sweep notices.
        """
        with Lease(self.ledger, job, self.settings.lease_seconds) as lease:
            try:
                yield lease
            except SupersededError:
                self._stopped(job)
            except Retryable as error:
                self._again(job, lease, error)
            except Permanent as error:
                LOG.warning("ended without result", job_id=job.id, attempt=job.attempt, reason=error.reason.name)
                self._end(job, lease, error.reason, error.detail, report=error.report or None)
            except LedgerUnavailableError as error:  # while it is away this fails, too, and the lease runs out
                LOG.failure("the database did not answer", error, job_id=job.id, attempt=job.attempt)
                self._again(job, lease, Retryable(Reason.ATTEMPTS_EXHAUSTED, "the database did not answer"))
            except OSError as error:
                full = error.errno in {errno.ENOSPC, errno.EDQUOT}
                self._unexpected(job, lease, Reason.STORAGE_FULL if full else Reason.INTERNAL_ERROR, error)
            except (Exception, MemoryError) as error:  # noqa: BLE001  the task boundary: no error may leave the job RUNNING
                self._unexpected(job, lease, Reason.INTERNAL_ERROR, error)

    def _again(self, job: Job, lease: Lease, error: Retryable) -> None:
        """Back off, or give up when all tries are used."""
        if job.state is State.DELIVERED:  # the moment of the next request stands in the ledger, and the lease runs out
            LOG.warning("commitment will be asked for again", job_id=job.id, reason=error.reason.name)
            return
        is_sending = job.state is State.DELIVERING
        most = self.settings.delivery_max_attempts if is_sending else self.settings.max_attempts
        # Tries, not attempts: those go on counting from run to run.
        detail = f"try {job.tries} of {most}: {error.detail}"
        if job.tries >= most:
            LOG.warning("ended without result", job_id=job.id, attempt=job.attempt, reason=error.reason.name)
            self._end(job, lease, error.reason, detail)
            return
        rule = retry.sending(self.settings) if is_sending else retry.computing(self.settings)
        due_at = self.clock() + rule.pause(job.tries, self.rng)
        LOG.warning("will be tried again", job_id=job.id, attempt=job.attempt, reason=error.reason.name)
        if is_sending:
            actor, progress = self.actor, lease.fraction
            postponed = self.ledger.deliveries.postpone(
                job, due_at, error.reason, detail, actor=actor, progress=progress
            )
        else:
            postponed = self._move(job, State.QUEUED, reason=error.reason, detail=detail, due_at=due_at)
        if postponed is None:
            self._stopped(job)

    def _unexpected(self, job: Job, lease: Lease, reason: Reason, error: BaseException) -> None:
        LOG.failure("unexpected error", error, job_id=job.id, attempt=job.attempt, reason=reason.name)
        self._end(job, lease, reason, kind_of(error))

    def _end(
        self, job: Job, lease: Lease, reason: Reason, detail: str, *, report: dict[str, Any] | None = None
    ) -> None:
        to, progress = STATE_OF_OUTCOME[reason.outcome], lease.fraction
        if self._move(job, to, reason=reason, detail=detail, report=report, progress=progress) is None:
            self._stopped(job)

    def _move(self, job: Job, to: State, **why: Any) -> Job | None:
        return self.ledger.jobs.move(job.id, [job.state], to, actor=self.actor, attempt=job.attempt, **why)

    def _stopped(self, job: Job) -> None:
        LOG.info("stopped: cancelled or taken over", job_id=job.id, attempt=job.attempt)
