"""Which studies are ready, and what then: everything between the arrival of an object and the start of a job.

Hides when a study is complete. DICOM has no end of study, so a study is ready as soon as its headers show one whole
pair of T1 series that agree and nothing has arrived for a moment; where headers leave a doubt, after a longer silence.
Every decision is made from what is persisted, so a restart, or two of these at work, change nothing. Must never decide
whether a study is fit for processing: that takes images, and is the worker's.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from celery import Celery

from service.core.actor import INTAKE
from service.core.dicom.series import HeaderSummary, find_pair
from service.core.dicom.site_rules import role_of
from service.core.errors import Reason
from service.core.job import Job, JobOptions, State
from service.core.ledger import Added, Instance, Ledger, LedgerError, WaitingStudy
from service.core.queue import enqueue
from service.core.retry import computing
from service.core.settings import Settings
from service.core.spool import Spool
from service.core.telemetry import Log, pseudonym
from service.objects import DicomObject

LOG = Log("intake")
TIDY_SECONDS = 3600.0


class Intake:
    """Admits objects and starts jobs. Every process that receives has one; one of them sweeps.

    Args:
        settings: delays, attempts, what a job asks for when nobody says otherwise.
        ledger: what has arrived.
        spool: where the bytes go.
        queue: made by `service.core.queue.make_celery`.
        clock: gives the present moment, timezone-aware; unset: the ledger's.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        spool: Spool,
        queue: Celery,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self._settings, self._ledger, self._spool, self._queue = settings, ledger, spool, queue
        self._clock = clock or ledger.now
        self._seen_unready: dict[str, int] = {}  # study -> number of its instances when it was last looked at
        self._tidied_at: datetime | None = None

    def admit(self, received: DicomObject, source: str) -> Added:
        """Make an object durable; when this returns, it is.

        Raises:
            OSError: the disk is full or broken.
            LedgerError: the database did not take it. The sender must be told to try again.
        """
        stored = self._spool.put(received.chunks)
        summary = replace(received.summary, role=role_of(self._settings.protocols, received.names))
        instance = Instance(
            sop_instance_uid=received.sop_instance_uid,
            study_uid=received.study_uid,
            series_uid=received.series_uid,
            sop_class_uid=received.sop_class_uid,
            transfer_syntax_uid=received.transfer_syntax_uid,
            sha256=stored.sha256,
            size=stored.size,
            received_at=self._clock(),
            source=source,
            summary=summary.to_json(),
        )
        return self._ledger.received.add(instance)

    def start(self, study_uid: str, options: JobOptions, source: str, actor: str = "") -> tuple[Job, bool]:
        """Start a job over what has arrived of a study, without waiting for more.

        Args:
            study_uid: the study.
            options: what is asked for.
            source: where the study came from.
            actor: who asks, for the history; unset: the source.

        Returns:
            The job, and whether it is new; the same input and options give the same job, and so does a look at the
            study that somebody else's was later than.
        """
        instances = self._ledger.received.of_study(study_uid)
        chosen, _ = _choose(instances, options)
        job, created = self._ledger.jobs.create(study_uid, chosen, options, source, instances, actor=actor)
        if created:
            LOG.info("job created", job_id=job.id, study=pseudonym(study_uid), count=len(chosen), actor=actor or source)
            enqueue(self._queue, self._ledger, job)
        return job, created

    def sweep(self) -> None:
        """One look at everything that may need something: studies, jobs that were given up, lost messages, old data."""
        for study in self._ledger.received.waiting():
            if self._is_ready(study):
                options = JobOptions(engine=self._settings.engine, destinations=self._settings.default_destinations)
                self.start(study.study_uid, options, self._ledger.received.of_study(study.study_uid)[-1].source)
        for job in self._ledger.jobs.expired():
            self._give_up_attempt(job)
        self._enqueue_due()
        self._tidy()

    def sweep_until(self, stop: threading.Event) -> None:
        """Sweep at intervals until told to stop. A database or disk that is away is waited for."""
        while not stop.is_set():
            try:
                self.sweep()
            except (LedgerError, OSError) as error:
                LOG.failure("sweep failed; it will be repeated", error)
            stop.wait(self._settings.sweep_seconds)

    def _is_ready(self, study: WaitingStudy) -> bool:
        silence = (self._clock() - study.last_received_at).total_seconds()
        if silence >= self._settings.quiet_seconds:
            return True
        if silence < self._settings.settle_seconds or self._seen_unready.get(study.study_uid) == study.instances:
            return False
        _, is_pair = _choose(self._ledger.received.of_study(study.study_uid), JobOptions())
        if is_pair:
            self._seen_unready.pop(study.study_uid, None)
        else:
            self._seen_unready[study.study_uid] = study.instances
        return is_pair

    def _give_up_attempt(self, job: Job) -> None:
        """The worker is silent: another may try, unless enough have."""
        if job.tries >= self._settings.max_attempts:
            to, reason, due_at = State.FAILED, Reason.ATTEMPTS_EXHAUSTED, None
        else:
            due_at = self._clock() + computing(self._settings).pause(job.tries)
            to, reason = State.QUEUED, None
        detail = f"{job.worker} was silent for longer than its lease"
        moved = self._ledger.jobs.move(
            job.id, [State.RUNNING], to, actor=INTAKE, reason=reason, detail=detail, attempt=job.attempt, due_at=due_at
        )
        if moved:
            LOG.warning("worker lost its job", job_id=job.id, state=to.value, attempt=job.attempt, actor=job.worker)

    def _enqueue_due(self) -> None:
        for job in self._ledger.jobs.due(self._settings.requeue_seconds):
            if job.state is State.DELIVERING and job.tries >= self._settings.delivery_max_attempts:
                self._ledger.jobs.move(
                    job.id, [State.DELIVERING], State.FAILED, actor=INTAKE, reason=Reason.ATTEMPTS_EXHAUSTED
                )
            elif not enqueue(self._queue, self._ledger, job):
                return  # the broker is away: the others would not get through either

    def _tidy(self) -> None:
        """Once in a while: what is older than the retention is forgotten, and bytes that nobody knows are deleted."""
        now = self._clock()
        if self._tidied_at and (now - self._tidied_at).total_seconds() < TIDY_SECONDS:
            return
        self._tidied_at = now
        retention = timedelta(days=self._settings.retention_days)
        forgotten = self._ledger.retention.forget(now - retention, self._settings.committing)
        deleted = self._spool.sweep_up(
            self._ledger.received.holds,
            lambda job_id: self._ledger.jobs.get(job_id) is not None,
            unfinished_seconds=TIDY_SECONDS,
            kept_seconds=max(TIDY_SECONDS, retention.total_seconds()),
        )
        if forgotten or deleted:
            LOG.info("tidied up", count=deleted)


def _choose(instances: Sequence[Instance], options: JobOptions) -> tuple[list[Instance], bool]:
    """The input of a job, and whether headers show it to be one whole pair.

    The series that were named; else the pair that headers show; else everything acquired, for the worker to judge.
    """
    named = {options.pre_series_uid, options.low_series_uid}
    if None not in named:
        return [item for item in instances if item.series_uid in named] or list(instances), True
    acquired, series = [], defaultdict(list)
    for item in instances:
        summary = HeaderSummary.from_json(item.summary)
        if not summary.is_synthetic:
            acquired.append(item)
            series[item.series_uid].append(summary)
    pair = find_pair(series) or ()
    return [item for item in acquired if item.series_uid in pair] or acquired or list(instances), bool(pair)
