"""The task `process`: a QUEUED job is computed, and its result published.

Hides where input comes from and where a result goes. A task is worth nothing without its claim, so a message that comes
twice and a worker that was given up end harmlessly. Must never publish a result that is no longer wanted, and never
leave one of an earlier run beside the reason why there is none now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from celery import Celery
from pydicom.dataset import Dataset

from models.runtime import Engine
from service.core.errors import Permanent, Reason
from service.core.job import Job, JobOptions, Stage, State
from service.core.ledger import CommitmentStatus, Delivery, Ledger
from service.core.queue import enqueue
from service.core.settings import Settings
from service.core.spool import Spool
from service.core.telemetry import Log
from worker.attempt import Attempts
from worker.compose.files import write_result
from worker.lease import Lease, SupersededError
from worker.pipeline import Progress

LOG = Log("worker")


class Computed(Protocol):
    """What a computation gives."""

    @property
    def series(self) -> Mapping[str, Sequence[Dataset]]:
        """Derived instances by kind (`service.core.job.Kind`)."""

    @property
    def report(self) -> dict[str, Any]:
        """Acquisition with provenance, quality checks, timings; JSON."""


class Computation(Protocol):
    """The pipeline: files in, derived instances out."""

    def __call__(self, paths: Sequence[Path], options: JobOptions, engine: Engine, progress: Progress) -> Computed:
        """Compute; `progress` raises when the job is no longer wanted, and must be let through."""


@dataclass(frozen=True)
class Processor:
    """Computes jobs, one after the other."""

    settings: Settings
    ledger: Ledger
    spool: Spool
    queue: Celery
    attempts: Attempts
    run: Computation
    load_engine: Callable[[str], Engine]
    _engines: dict[str, Engine] = field(default_factory=dict)

    def process(self, job_id: str) -> None:
        """Compute a QUEUED job. Anything else is left alone: somebody was faster."""
        job = self.ledger.jobs.claim(job_id, self.attempts.actor, self.settings.lease_seconds)
        if job is None:
            return
        LOG.info("started", job_id=job.id, attempt=job.attempt)
        with self.attempts.at(job) as lease:
            self.spool.remove_result(job.id)  # an earlier one must not stand beside the reason why there is none now
            result = self.run(self._inputs(job), job.options, self._engine(job.options.engine), lease.progress)
            lease.progress(Stage.WRITE, 0.95)
            self._publish(job, result, lease)

    def _inputs(self, job: Job) -> list[Path]:
        paths = [self.spool.path(instance.sha256) for instance in self.ledger.jobs.inputs(job.id)]
        missing = sum(not path.is_file() for path in paths)
        if missing or not paths:
            raise Permanent(Reason.INPUT_LOST, f"{missing} of {len(paths)} instances are gone")
        return paths

    def _engine(self, name: str) -> Engine:
        """Loaded when it is first needed and then kept: a model takes seconds and much memory."""
        if name not in self._engines:
            self._engines[name] = self.load_engine(name)
        return self._engines[name]

    def _publish(self, job: Job, result: Computed, lease: Lease) -> None:
        with self.spool.publish(job.id) as folder:
            written = write_result(result.series, result.report, folder)
            lease.check()
        deliveries = [
            Delivery(destination, commitment=self._commitment_of(destination), **asdict(item))
            for destination in job.options.destinations
            for item in written
            if self._is_wanted(destination, item.kind)
        ]
        actor, report = self.attempts.actor, result.report
        done = self.ledger.jobs.finish(job.id, job.attempt, actor=actor, report=report, deliveries=deliveries)
        if done is None:
            self._withdraw(job)
            raise SupersededError
        LOG.info("computed", job_id=job.id, attempt=job.attempt, count=sum(map(len, result.series.values())))
        if done.state is State.DELIVERING:
            enqueue(self.queue, self.ledger, done)

    def _is_wanted(self, name: str, kind: str) -> bool:
        """Whether a destination takes this kind of result; one that is no longer known fails when it is sent to."""
        destination = self.settings.destination(name)
        return destination is None or destination.takes(kind)

    def _commitment_of(self, destination: str) -> CommitmentStatus:
        return CommitmentStatus.WANTED if self.settings.committing.get(destination) else CommitmentStatus.NONE

    def _withdraw(self, job: Job) -> None:
        """The job was cancelled in the moment between publishing and telling: there must be no result to find."""
        now = self.ledger.jobs.get(job.id)
        if now is not None and now.state is State.CANCELLED and now.attempt == job.attempt:
            self.spool.remove_result(job.id)
