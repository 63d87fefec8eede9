"""The two tasks of a worker: `process` computes a job, `deliver` sends its result.

Hides Celery, leases and what each failure does to a job. A task is worth nothing without its claim: it is taken by
compare-and-set, kept alive by a heartbeat in a thread of its own, and fenced by the attempt number, so a message that
comes twice, a worker that was given up and an operator's cancel all end harmlessly. Must never let an error leave a job
RUNNING, and never write a result that is no longer wanted.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from celery import Celery
from pydicom.dataset import Dataset
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from models.runtime import Engine
from service.core.dicom.commitment import (
    CLASS_INSTANCE_CONFLICT,
    NO_SUCH_OBJECT_INSTANCE,
    SOP_CLASS_NOT_SUPPORTED,
    Reference,
    Report,
)
from service.core.dicom.commitment import WORDS as COMMITMENT_WORDS
from service.core.errors import Permanent, Reason, Retryable
from service.core.job import STATE_OF_OUTCOME, Job, JobOptions, Stage, State
from service.core.ledger import Commitment, Delivery, DeliveryStatus, Ledger, Transaction
from service.core.queue import DELIVER, PROCESS, enqueue_deliver, make_celery
from service.core.settings import Destination, Settings
from service.core.spool import Spool
from service.core.telemetry import Log
from worker.compose.files import write_result
from worker.deliver.committing import request_commitment
from worker.deliver.sending import Answer, Verdict, backoff_seconds, is_sendable, send
from worker.pipeline import Progress

BEATS_PER_LEASE = 4
REPORT_EVERY_SECONDS = 0.5  # progress goes to the ledger no more often than this
PROCESS_RETRY_MAX_SECONDS = 600.0
STATUS_OF_VERDICT = {
    Verdict.SENT: DeliveryStatus.SENT,
    Verdict.SENT_WITH_WARNING: DeliveryStatus.SENT,
    Verdict.REFUSED: DeliveryStatus.FAILED,
    Verdict.BUSY: DeliveryStatus.PENDING,
}
REFUSED_FOR_GOOD = {CLASS_INSTANCE_CONFLICT, SOP_CLASS_NOT_SUPPORTED}


class Result(Protocol):
    """What a computation gives."""

    @property
    def series(self) -> Mapping[str, Sequence[Dataset]]:
        """Derived instances by kind (`service.core.job.Kind`)."""

    @property
    def report(self) -> dict[str, Any]:
        """Acquisition with provenance, quality checks, timings; JSON."""


class Run(Protocol):
    """The pipeline: files in, derived instances out."""

    def __call__(self, paths: Sequence[Path], options: JobOptions, engine: Engine, progress: Progress) -> Result:
        """Compute; `progress` raises when the job is no longer wanted, and must be let through."""


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
        self._stage: Stage | None = None
        self._reported_at = 0.0

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def progress(self, stage: Stage, fraction: float) -> None:
        """Tell the ledger how far the job is (0..1 of the whole).

        Raises:
            SupersededError: the job is no longer ours.
        """
        now = time.monotonic()
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
        if not self._ledger.heartbeat(self._job, stage, fraction, lease_seconds=self._seconds):
            self._lost.set()

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds / BEATS_PER_LEASE):
            self._try_to_extend()

    def _try_to_extend(self, stage: Stage | None = None, fraction: float | None = None) -> None:
        try:
            self._extend(stage, fraction)
        except SQLAlchemyError as error:  # the database may come back before the lease has run out
            LOG.warning("heartbeat not written", job_id=self._job.id, reason=type(error).__name__)


@dataclass
class Worker:
    """Does both tasks. Safe to use from one thread; every process has its own."""

    settings: Settings
    ledger: Ledger
    spool: Spool
    queue: Celery
    run: Run
    load_engine: Callable[[str], Engine]
    clock: Callable[[], datetime]  # the ledger's
    name: str = field(default_factory=lambda: f"worker:{socket.gethostname()}:{os.getpid()}")
    rng: random.Random = field(default_factory=random.Random)
    _engines: dict[str, Engine] = field(default_factory=dict)

    def process(self, job_id: str) -> None:
        """Compute a QUEUED job. Anything else is left alone: somebody was faster."""
        job = self.ledger.claim(job_id, self.name, self.settings.lease_seconds)
        if job is None:
            return
        LOG.info("started", job_id=job.id, attempt=job.attempt)
        with Lease(self.ledger, job, self.settings.lease_seconds) as lease, self._failing(job, State.RUNNING):
            self.spool.remove_result(job.id)  # an earlier one must not stand beside the reason why there is none now
            result = self.run(self._inputs(job), job.options, self._engine(job.options.engine), lease.progress)
            lease.progress(Stage.WRITE, 0.95)
            self._publish(job, result, lease)

    def deliver(self, job_id: str) -> None:
        """Send what a DELIVERING job still has to send, and ask for storage commitment where that is due."""
        if job := self.ledger.claim_delivery(job_id, self.name, self.settings.lease_seconds):
            with self._failing(job, State.DELIVERING):
                with Lease(self.ledger, job, self.settings.lease_seconds) as lease:
                    self._refuse_lost_result(job)
                    troubles = [trouble for name in self._pending(job) if (trouble := self._send_to(job, name, lease))]
                    lease.check()
                self._conclude(job, troubles)
        seconds, committing = self.settings.lease_seconds, self.settings.committing
        if job := self.ledger.claim_commitment(job_id, self.name, seconds, committing):
            with self._failing(job, State.DELIVERED):
                with Lease(self.ledger, job, seconds) as lease:
                    said = self._ask_all(job, lease)
                self.ledger.leave_waiting(job.id, job.attempt, "; ".join(filter(None, said)))

    # --- computing ----------------------------------------------------------------------------------------------------

    def _inputs(self, job: Job) -> list[Path]:
        paths = [self.spool.path(instance.sha256) for instance in self.ledger.inputs(job.id)]
        missing = sum(not path.is_file() for path in paths)
        if missing or not paths:
            raise Permanent(Reason.INPUT_LOST, f"{missing} of {len(paths)} instances are gone")
        return paths

    def _engine(self, name: str) -> Engine:
        """Loaded when it is first needed and then kept: a model takes seconds and much memory."""
        if name not in self._engines:
            self._engines[name] = self.load_engine(name)
        return self._engines[name]

    def _publish(self, job: Job, result: Result, lease: Lease) -> None:
        with self.spool.publish(job.id) as folder:
            written = write_result(result.series, result.report, folder)
            lease.check()
        deliveries = [
            Delivery(destination, commitment=self._commitment_of(destination), **asdict(item))
            for destination in job.options.destinations
            for item in written
            if self._wanted(destination, item.kind)
        ]
        done = self.ledger.finish(job.id, job.attempt, actor=self.name, report=result.report, deliveries=deliveries)
        if done is None:
            self._withdraw(job)
            raise SupersededError
        LOG.info("computed", job_id=job.id, attempt=job.attempt, count=sum(map(len, result.series.values())))
        if done.state is State.DELIVERING and enqueue_deliver(self.queue, job.id):
            self.ledger.mark_enqueued(job.id)

    def _wanted(self, name: str, kind: str) -> bool:
        """Whether a destination takes this kind of result; one that is no longer known fails when it is sent to."""
        destination = self.settings.destination(name)
        return destination is None or destination.takes(kind)

    def _withdraw(self, job: Job) -> None:
        """The job was cancelled in the moment between publishing and telling: there must be no result to find."""
        now = self.ledger.job(job.id)
        if now is not None and now.state is State.CANCELLED and now.attempt == job.attempt:
            self.spool.remove_result(job.id)

    # --- sending ------------------------------------------------------------------------------------------------------

    def _pending(self, job: Job) -> dict[str, list[Delivery]]:
        """What is still to be sent, by destination."""
        pending: dict[str, list[Delivery]] = {}
        for delivery in self.ledger.deliveries(job.id):
            if delivery.status is DeliveryStatus.PENDING:
                pending.setdefault(delivery.destination, []).append(delivery)
        return pending

    def _refuse_lost_result(self, job: Job) -> None:
        """Half a result is not sent: another run makes it anew, with the same UIDs.

        Raises:
            Permanent: RESULT_LOST.
        """
        folder = self.spool.result_dir(job.id)
        paths = {item.path for item in self.ledger.deliveries(job.id) if item.status is DeliveryStatus.PENDING}
        if lost := sum(not is_sendable(folder / path) for path in paths):
            raise Permanent(Reason.RESULT_LOST, f"{lost} of {len(paths)} files to send are gone or damaged")

    def _send_to(self, job: Job, name: str, lease: Lease) -> Retryable | Permanent | None:
        """Send to one destination and note every answer; the trouble that ended it early, if any."""
        folder, waiting = self.spool.result_dir(job.id), self._pending(job)[name]
        by_path = {folder / delivery.path: delivery for delivery in waiting}
        try:
            for done, answer in enumerate(send(list(by_path), self._destination(name)), start=1):
                self._note(job, by_path[answer.path], answer)
                lease.progress(Stage.DELIVER, done / len(by_path))
        except Permanent as error:
            for delivery in self._pending(job).get(name, []):
                self._record(job, delivery, DeliveryStatus.FAILED, None, error.detail)
            return error
        except Retryable as error:
            return error
        return None

    def _destination(self, name: str) -> Destination:
        destination = self.settings.destination(name)
        if destination is None:
            raise Permanent(Reason.DESTINATION_REFUSED, f"no destination is called {name} any more")
        return destination

    def _note(self, job: Job, delivery: Delivery, answer: Answer) -> None:
        text = "" if answer.verdict is Verdict.SENT else answer.text
        self._record(job, delivery, STATUS_OF_VERDICT[answer.verdict], answer.status, text)

    def _record(self, job: Job, delivery: Delivery, status: DeliveryStatus, dimse: int | None, error: str) -> None:
        is_ours = self.ledger.record_delivery(
            job.id,
            delivery.destination,
            delivery.sop_instance_uid,
            status,
            dimse_status=dimse,
            error=error,
            attempt=job.attempt,
        )
        if not is_ours:
            raise SupersededError

    def _conclude(self, job: Job, troubles: Sequence[Retryable | Permanent]) -> None:
        """Delivered, refused, or another attempt."""
        deliveries = self.ledger.deliveries(job.id)
        counts = {status: sum(item.status is status for item in deliveries) for status in DeliveryStatus}
        sentence = f"{counts[DeliveryStatus.SENT]} of {len(deliveries)} instances sent"
        details = "; ".join([sentence, *(trouble.detail for trouble in troubles)])
        if counts[DeliveryStatus.PENDING]:
            raise Retryable(Reason.DESTINATION_UNREACHABLE, details)
        if counts[DeliveryStatus.FAILED]:
            refusals = sorted({item.last_error for item in deliveries if item.status is DeliveryStatus.FAILED})
            raise Permanent(Reason.DESTINATION_REFUSED, "; ".join([sentence, *refusals]))
        done = self.ledger.delivered(job.id, job.attempt, actor=self.name, committing=self.settings.committing)
        if done is None:
            raise SupersededError

    # --- storage commitment -------------------------------------------------------------------------------------------

    def _commitment_of(self, destination: str) -> Commitment:
        return Commitment.WANTED if self.settings.committing.get(destination) else Commitment.NONE

    def _ask_all(self, job: Job, lease: Lease) -> list[str]:
        """Ask every destination that owes one, whatever the others say, then raise what the first hopeless one said."""
        said, hopeless = [], []
        for name in sorted({item.destination for item in self.ledger.deliveries(job.id) if item.is_open}):
            try:
                said.append(self._ask_when_due(job, name, lease))
            except Permanent as error:
                hopeless.append(error)
        if hopeless:
            raise hopeless[0]
        return said

    def _ask_when_due(self, job: Job, name: str, lease: Lease) -> str:
        """Ask a destination that owes a commitment, if this is the moment; how things stand with it, in words."""
        owed = [item for item in self.ledger.deliveries(job.id) if item.destination == name and item.is_open]
        asked = [item for item in self.ledger.transactions(job.id) if item.destination == name]
        if not owed:
            return ""
        if not asked or asked[-1].due_at <= self.clock():
            self._refuse_hopeless(job, name, owed, asked)
            self._ask(job, self._destination(name), owed, len(asked) + 1, lease)
        return self._standing(job, name)

    def _refuse_hopeless(self, job: Job, name: str, owed: Sequence[Delivery], asked: Sequence[Transaction]) -> None:
        """Send again what the destination says it does not have; give up where asking again will not help.

        Raises:
            SupersededError: it is being sent again.
            Permanent: COMMITMENT_REFUSED or COMMITMENT_TIMEOUT.
        """
        reasons = {item.failure_reason for item in owed if item.failure_reason is not None}
        refused = ", ".join(f"0x{reason:04X} {COMMITMENT_WORDS.get(reason, '')}".strip() for reason in sorted(reasons))
        is_over = bool(asked) and self.clock() >= self._limit(asked)
        if reasons & REFUSED_FOR_GOOD or (reasons and is_over):
            raise Permanent(Reason.COMMITMENT_REFUSED, f"{name}: {len(owed)} instances not committed: {refused}")
        if is_over:
            raise Permanent(Reason.COMMITMENT_TIMEOUT, f"{name}: asked {len(asked)} times about {len(owed)} instances")
        if NO_SUCH_OBJECT_INSTANCE in reasons:
            detail = f"{name} took instances and does not have them; they are sent again"
            LOG.warning("committing failed: sent again", job_id=job.id, destination=name)
            self.ledger.send_refused_again(job.id, job.attempt, NO_SUCH_OBJECT_INSTANCE, actor=self.name, detail=detail)
            raise SupersededError

    def _ask(self, job: Job, destination: Destination, owed: Sequence[Delivery], attempt: int, lease: Lease) -> None:
        """One request in a new transaction (PS3.4 section J.3.2.1.1), noted before it is sent."""
        transaction_uid = f"2.25.{uuid.uuid4().int}"
        references = [Reference(item.sop_class_uid, item.sop_instance_uid) for item in owed]
        first, cap = self.settings.delivery_retry_seconds, self.settings.commitment_timeout_seconds
        pause_seconds = backoff_seconds(attempt, first, cap, self.rng)
        if not self.ledger.ask_commitment(job.id, job.attempt, destination.name, transaction_uid, pause_seconds):
            raise SupersededError
        LOG.info("asking for storage commitment", job_id=job.id, destination=destination.name, count=len(owed))
        try:
            request_commitment(
                transaction_uid,
                references,
                destination,
                lambda report: self._believe(report, destination),
                lambda: lease.is_lost or self._is_answered(transaction_uid),
            )
        except Retryable as error:
            LOG.warning("not asked for storage commitment", job_id=job.id, reason=error.reason.name)
            return
        self.ledger.await_commitment(transaction_uid, self.settings.commitment_timeout_seconds)

    def _believe(self, report: Report, destination: Destination) -> None:
        """A report that came on our own association to the destination, which speaks for itself alone.

        Raises:
            MessageError: it tells of something that the destination was not asked.
        """
        self.ledger.answer_commitment(report, {destination.name}, actor=self.name)

    def _is_answered(self, transaction_uid: str) -> bool:
        transaction = self.ledger.transaction(transaction_uid)
        return transaction is None or transaction.answered_at is not None

    def _standing(self, job: Job, name: str) -> str:
        owed = [item for item in self.ledger.deliveries(job.id) if item.destination == name and item.is_open]
        asked = [item for item in self.ledger.transactions(job.id) if item.destination == name]
        if not owed or not asked:
            return ""
        until = f"until {self._limit(asked):%Y-%m-%d %H:%M} UTC"
        return f"{name}: storage commitment of {len(owed)} instances asked for {len(asked)} times, {until}"

    def _limit(self, asked: Sequence[Transaction]) -> datetime:
        """The moment from which a destination is not asked again."""
        return asked[0].asked_at + timedelta(seconds=self.settings.commitment_limit_seconds)

    # --- the task boundary --------------------------------------------------------------------------------------------

    @contextmanager
    def _failing(self, job: Job, state: State) -> Iterator[None]:
        """Whatever goes wrong in the block becomes the job's next state."""
        try:
            yield
        except SupersededError:
            LOG.info("stopped: cancelled or taken over", job_id=job.id, attempt=job.attempt)
        except Retryable as error:
            self._again(job, state, error)
        except Permanent as error:
            self._end(job, state, error.reason, error.detail, error.report)
        except (OperationalError, InterfaceError) as error:  # while it is away this fails, too, and the lease runs out
            LOG.failure("the database did not answer", error, job_id=job.id, attempt=job.attempt)
            self._again(job, state, Retryable(Reason.ATTEMPTS_EXHAUSTED, "the database did not answer"))
        except OSError as error:
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            self._unexpected(job, state, Reason.STORAGE_FULL if full else Reason.INTERNAL_ERROR, error)
        except (Exception, MemoryError) as error:  # noqa: BLE001  the task boundary: no error may leave the job RUNNING
            self._unexpected(job, state, Reason.INTERNAL_ERROR, error)

    def _again(self, job: Job, state: State, error: Retryable) -> None:
        """Back off, or give up when all attempts are used."""
        settings = self.settings
        if state is State.DELIVERED:  # the moment of the next request stands in the ledger, and the lease runs out
            LOG.warning("commitment will be asked for again", job_id=job.id, reason=error.reason.name)
            return
        if state is State.RUNNING:
            most, first, cap = settings.max_attempts, settings.retry_seconds, PROCESS_RETRY_MAX_SECONDS
        else:
            most, first = settings.delivery_max_attempts, settings.delivery_retry_seconds
            cap = settings.delivery_retry_max_seconds
        if job.tries >= most:
            self._end(job, state, error.reason, f"attempt {job.tries} of {most}: {error.detail}")
            return
        due_at = self.clock() + timedelta(seconds=backoff_seconds(job.tries, first, cap, self.rng))
        LOG.warning("will be tried again", job_id=job.id, attempt=job.attempt, reason=error.reason.name)
        detail = f"attempt {job.tries} of {most}: {error.detail}"
        if state is State.DELIVERING:
            self.ledger.postpone_delivery(job.id, job.attempt, due_at, error.reason, detail)
        else:
            self._move(job, state, State.QUEUED, reason=error.reason, detail=detail, due_at=due_at)

    def _end(self, job: Job, state: State, reason: Reason, detail: str, report: dict[str, Any] | None = None) -> None:
        LOG.warning("ended without result", job_id=job.id, attempt=job.attempt, reason=reason.name)
        self._move(job, state, STATE_OF_OUTCOME[reason.outcome], reason=reason, detail=detail, report=report or None)

    def _unexpected(self, job: Job, state: State, reason: Reason, error: BaseException) -> None:
        LOG.failure("unexpected error", error, job_id=job.id, attempt=job.attempt, reason=reason.name)
        self._move(job, state, STATE_OF_OUTCOME[reason.outcome], reason=reason, detail=type(error).__name__)

    def _move(self, job: Job, state: State, to: State, **why: Any) -> None:
        self.ledger.move(job.id, [state], to, actor=self.name, attempt=job.attempt, **why)


LOG = Log("worker")


def make_app(settings: Settings, run: Run, load_engine: Callable[[str], Engine]) -> Celery:
    """The Celery application of a worker, with both tasks.

    Database, spool and engine are opened by the first task, after Celery has forked.
    """
    app, workers = make_celery(settings), list[Worker]()

    def worker() -> Worker:
        if not workers:
            spool = Spool(settings.spool_dir, settings.disk_low_bytes)
            ledger = Ledger.open(settings.ledger_url)
            workers.append(Worker(settings, ledger, spool, app, run, load_engine, ledger.now))
        return workers[0]

    @app.task(name=PROCESS)  # type: ignore[untyped-decorator]  # celery has no types
    def process(job_id: str) -> None:
        with ended_when_hung(settings.task_limit_seconds):
            worker().process(job_id)

    @app.task(name=DELIVER)  # type: ignore[untyped-decorator]  # celery has no types
    def deliver(job_id: str) -> None:
        with ended_when_hung(settings.task_limit_seconds):
            worker().deliver(job_id)

    return app


@contextmanager
def ended_when_hung(seconds: float) -> Iterator[None]:
    """End this process, with a trace of all its threads on standard error, if the block takes longer than that.

    The lease runs out then, and another attempt starts in a new process. Celery's own limits need a pool of processes,
    which would load the engine twice and double the memory; and what hangs may hold the interpreter's lock, so that no
    thread of ours would wake up. This timer needs no lock.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # Celery replaces sys.stderr
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
