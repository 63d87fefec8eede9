"""The Celery application of a worker: its two tasks, and the guard that ends a process which hangs.

Hides Celery. What the tasks do stands in `worker.process` and `worker.deliver.delivery`, what a failure does to a job
in `worker.attempt`. Must never open database, spool or engine before Celery has forked.
"""

from __future__ import annotations

import faulthandler
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from celery import Celery

from models.runtime import Engine
from service.core import actor
from service.core.ledger import Ledger
from service.core.queue import DELIVER, PROCESS, make_celery
from service.core.settings import Settings
from service.core.spool import Spool
from worker.attempt import Attempts
from worker.deliver.delivery import Deliverer
from worker.process import Computation, Processor


@dataclass
class Worker:
    """Does both tasks. Safe to use from one thread; every process has its own."""

    settings: Settings
    ledger: Ledger
    spool: Spool
    queue: Celery
    run: Computation
    load_engine: Callable[[str], Engine]
    clock: Callable[[], datetime]  # the ledger's
    name: str = field(default_factory=lambda: actor.worker(socket.gethostname(), os.getpid()))
    rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        settings, ledger, spool = self.settings, self.ledger, self.spool
        attempts = Attempts(settings, ledger, self.name, self.clock, self.rng)
        processor = Processor(settings, ledger, spool, self.queue, attempts, self.run, self.load_engine)
        self.process, self.deliver = processor.process, Deliverer(settings, ledger, spool, attempts).deliver


def make_app(settings: Settings, run: Computation, load_engine: Callable[[str], Engine]) -> Celery:
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
