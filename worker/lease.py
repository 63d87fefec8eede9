"""The lease: a claimed job is kept alive by a heartbeat, and its owner learns here when it is his no longer.

Hides the thread that extends the lease, and how seldom progress is written. Must never take back a job that was
cancelled, given up or handed on: whoever holds a lost lease stops, and throws the work away.
"""

from __future__ import annotations

import threading
import time

from service.core.job import Job, Stage
from service.core.ledger import Ledger, LedgerError
from service.core.telemetry import Log

LOG = Log("worker")
BEATS_PER_LEASE = 4
REPORT_EVERY_SECONDS = 0.5  # progress goes to the ledger no more often than this


class SupersededError(Exception):
    """The job was cancelled, or another attempt owns it: stop, and throw the work away."""


class Lease:
    """A claimed job, kept alive by a thread until the block ends.

    Args:
        ledger: where the heartbeat goes.
        job: as it was claimed.
        seconds: how long the claim lasts without a heartbeat.
    """

    def __init__(self, ledger: Ledger, job: Job, seconds: float) -> None:
        self._ledger, self._job, self._seconds = ledger, job, seconds
        self._ended, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{job.id[:8]}", daemon=True)
        self._stage, self._reported_at = job.stage, time.monotonic()  # what the claim wrote
        self.fraction: float | None = None  # of the whole, as it was last told, written or not

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def progress(self, stage: Stage, fraction: float) -> None:
        """Say how far the job is (0..1 of the whole); the ledger is told of a new stage at once, else now and then.

        Raises:
            SupersededError: the job is no longer ours.
        """
        now, self.fraction = time.monotonic(), fraction
        if stage is not self._stage or now - self._reported_at >= REPORT_EVERY_SECONDS:
            self._stage, self._reported_at = stage, now
            self._try_to_extend(stage, fraction)
        self.refuse_if_lost()

    def check(self) -> None:
        """Ask the ledger now.

        Raises:
            SupersededError: the job is no longer ours.
        """
        self._extend()
        self.refuse_if_lost()

    def refuse_if_lost(self) -> None:
        """Raise SupersededError when a heartbeat has found the job gone."""
        if self.is_lost:
            raise SupersededError

    @property
    def is_lost(self) -> bool:
        """Whether a heartbeat has found the job gone."""
        return self._lost.is_set()

    def _extend(self, stage: Stage | None = None, fraction: float | None = None) -> None:
        if not self._ledger.jobs.heartbeat(self._job, stage, fraction, lease_seconds=self._seconds):
            self._lost.set()

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds / BEATS_PER_LEASE):
            self._try_to_extend()

    def _try_to_extend(self, stage: Stage | None = None, fraction: float | None = None) -> None:
        try:
            self._extend(stage, fraction)
        except LedgerError as error:  # the database may come back before the lease has run out
            LOG.warning("heartbeat not written", job_id=self._job.id, reason=str(error))
