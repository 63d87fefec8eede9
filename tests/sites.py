"""A site with one worker: a real ledger, spool and embedded broker; the computation is a stand-in.

Hides how they are put together. What the worker asks of the ledger is counted on the way (`Site.counted`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset

from models.runtime import Engine, LinearEngine
from service.core.job import Job, JobOptions, Stage, State
from service.core.ledger import DeliveryStatus, Ledger
from service.core.queue import make_celery
from service.core.settings import Destination, Settings
from service.core.spool import Spool
from service.intake import Intake
from service.objects import from_file
from tests.conftest import Clock
from tests.factories import encode, make_pair, uid
from worker.app import Worker
from worker.pipeline import Progress

PAIR = make_pair(slices=8, rows=8, columns=8)


@dataclass
class FakeResult:
    """What the stand-in gives."""

    series: dict[str, list[Dataset]]
    report: dict[str, Any] = field(default_factory=lambda: {"seconds": {"read": 0.1}})


class FakeComputation:
    """Stands in for the pipeline: gives `series`, or two images of SD and SD+, after what a test wants to happen."""

    def __init__(self) -> None:
        self.before: Callable[[Progress], None] = lambda _: None
        self.series: dict[str, list[Dataset]] = {}
        self.paths: list[Path] = []
        self.calls = 0

    def __call__(self, paths: Sequence[Path], options: JobOptions, engine: Engine, progress: Progress) -> FakeResult:
        self.calls += 1
        self.paths = list(paths)
        progress(Stage.READ, 0.1)
        self.before(progress)
        progress(Stage.INFER, 0.6)
        return FakeResult(self.series or {kind: self.derived(kind) for kind in ("sd", "sd_plus")})

    def derived(self, kind: str) -> list[Dataset]:
        datasets = [pydicom.dcmread(self.paths[0]), pydicom.dcmread(self.paths[0])]
        for number, dataset in enumerate(datasets):
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid("derived", kind, number)
        return datasets


class CountedLedger:
    """A ledger that counts what it is asked, as "book.method"; everything goes to the real one."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self.calls = ledger, Counter[str]()

    def __getattr__(self, book: str) -> CountedBook:
        return CountedBook(getattr(self._ledger, book), book, self.calls)


@dataclass(frozen=True)
class CountedBook:
    """One book of it."""

    book: Any
    name: str
    calls: Counter[str]

    def __getattr__(self, method: str) -> Callable[..., Any]:
        self.calls[f"{self.name}.{method}"] += 1
        found: Callable[..., Any] = getattr(self.book, method)
        return found


class Site:
    """One worker and everything around it."""

    def __init__(self, folder: Path, clock: Clock, port: int = 104, **settings: Any) -> None:
        named = {"name": "pacs", "host": "127.0.0.1", "ae_title": "ARCHIVE"} | settings.pop("destination", {})
        pacs = Destination(port=port, **named)
        self.settings = Settings(
            data_dir=folder, destinations=(pacs,), default_destinations=("pacs",), lease_seconds=5, **settings
        )
        self.clock = clock
        self.ledger = Ledger.open(self.settings.ledger_url, clock)
        self.counted = CountedLedger(self.ledger)
        self.spool = Spool(self.settings.spool_dir)
        self.queue = make_celery(self.settings)
        self.computation = FakeComputation()
        self.engines_loaded: list[str] = []
        self.worker = self.another_worker("worker:1")

    def another_worker(self, name: str, **changes: Any) -> Worker:
        """A worker of that name on the same ledger, spool and queue; `changes` are settings of its own."""
        return Worker(
            settings=self.settings.model_copy(update=changes),
            ledger=self.counted,  # type: ignore[arg-type]  it does what the real one does, and counts
            spool=self.spool,
            queue=self.queue,
            run=self.computation,
            load_engine=self.load,
            name=name,
            clock=self.clock,
            rng=random.Random(1),
        )

    def restart_worker(self, **changes: Any) -> None:
        """As after somebody has changed these settings."""
        self.worker = self.another_worker("worker:1", **changes)

    def load(self, name: str) -> Engine:
        self.engines_loaded.append(name)
        return LinearEngine()

    def new_job(self, *destinations: str) -> str:
        intake = Intake(self.settings, self.ledger, self.spool, self.queue, self.clock)
        for dataset in PAIR.all:
            intake.admit(from_file(encode(dataset)), "dimse:MR")
        job, _ = intake.start(uid(0, "study"), JobOptions(destinations=destinations), "dimse:MR")
        return job.id

    def asked_of_the_ledger(self) -> Counter[str]:
        """How often the worker called each method, without heartbeats: how many there are depends on the time."""
        return Counter({name: calls for name, calls in self.counted.calls.items() if name != "jobs.heartbeat"})

    def job(self, job_id: str) -> Job:
        job = self.ledger.jobs.get(job_id)
        assert job is not None
        return job

    def states(self, job_id: str) -> list[State]:
        return [step.to_state for step in self.ledger.jobs.history(job_id)]

    def statuses(self, job_id: str) -> list[DeliveryStatus]:
        return [row.status for row in self.ledger.deliveries.of_job(job_id)]
