"""Messages that say "look at this job": Celery on Redis, or on files in the data folder where no server is wanted.

Hides the broker. A message is the id of a job and nothing else; losing or doubling one does no harm, because workers
claim jobs in the ledger and the sweep enqueues again what was lost. Must never carry pixels or patient data, and must
never fail a caller because the broker is away.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from queue import Empty
from typing import Any
from uuid import uuid4

from celery import Celery
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES, filesystem

from service.core.job import Job, State
from service.core.ledger import Ledger
from service.core.settings import EMBEDDED_BROKER, Settings
from service.core.telemetry import Log

LOG = Log("queue")

PROCESS, DELIVER = "process", "deliver"  # names of the tasks, and of the queues they travel in
BROKER_ANSWERS_WITHIN_SECONDS = 3
EMBEDDED_POLLING_SECONDS = 0.2


def make_celery(settings: Settings) -> Celery:
    """The Celery application, for senders and workers alike. The worker registers the tasks by name."""
    app = Celery("lowgad", set_as_current=False)
    app.conf.update(
        # Messages travel over the default exchange, which routes by the queue's name (Celery does so where a task names
        # a queue and no exchange). So no bindings are needed, which a broker could lose.
        task_queues={name: {"routing_key": name} for name in (PROCESS, DELIVER)},
        task_routes={name: {"queue": name} for name in (PROCESS, DELIVER)},
        task_default_queue=PROCESS,
        task_create_missing_queues=False,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        # A worker that dies gives its message back; one message at a time, so that none waits behind a long job.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_limit=4,
        **_broker(settings),
    )
    return app


def enqueue(app: Celery, ledger: Ledger, job: Job) -> bool:
    """Hand a job to the queue that its state calls for, and note in the ledger that this was done.

    Returns:
        False when the broker did not take it: the job stays in the ledger, and the sweep will try again.

    Raises:
        LedgerError: the message is sent and not noted; it will be sent again, which does no harm.
    """
    task = DELIVER if job.state in {State.DELIVERING, State.DELIVERED} else PROCESS
    if not send(app, task, job.id):
        LOG.warning("the broker did not take the job; it stays in the ledger", job_id=job.id)
        return False
    ledger.jobs.mark_enqueued(job.id)
    return True


def send(app: Celery, task: str, job_id: str) -> bool:
    """Put a message into the queue of a task; False when the broker did not take it."""
    try:
        app.send_task(task, args=[job_id], retry=False)
    except (OperationalError, OSError):
        return False
    return True


def is_reachable(app: Celery) -> bool:
    """Whether the broker answers."""
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=BROKER_ANSWERS_WITHIN_SECONDS)
    except (OperationalError, OSError):
        return False
    return True


def _broker(settings: Settings) -> dict[str, Any]:
    if settings.broker_url != EMBEDDED_BROKER:
        seconds = BROKER_ANSWERS_WITHIN_SECONDS
        options: dict[str, Any] = {
            "socket_connect_timeout": seconds,
            "socket_timeout": seconds,
            "health_check_interval": 30,
            # A sender learns at once that the broker is away: uploads and clicks wait for the answer.
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0,
            "interval_max": 0,
        }
        return {"broker_url": settings.broker_url, "broker_transport_options": options}
    TRANSPORT_ALIASES["lowgad-files"] = f"{__name__}:EmbeddedBroker"
    folder = settings.broker_dir.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = {
        "data_folder_in": str(folder),
        "data_folder_out": str(folder),
        "polling_interval": EMBEDDED_POLLING_SECONDS,
    }
    return {"broker_url": "lowgad-files://localhost//", "broker_transport_options": options}


class _Channel(filesystem.Channel):
    """kombu's channel over files, with messages that appear and disappear as a whole and in order of arrival.

    The original writes a message in place, so that a reader may find half of it, and moves it through the system's
    temporary folder, where a crash leaves it.
    """

    def _put(self, queue: str, payload: dict[str, Any], **_: object) -> None:  # type: ignore[override]  # kombu disagrees with itself
        folder = Path(self.data_folder_out)
        unfinished = folder / f"{uuid4().hex}.unfinished"
        unfinished.write_text(json.dumps(payload), encoding="utf-8")
        unfinished.rename(folder / f"{time.time_ns():020}-{uuid4().hex}.{queue}.msg")

    def _queue_bind(self, *_: object) -> None:
        """Nothing to note: a message is filed under the name of its queue."""

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:  # noqa: ARG002  signature of kombu
        for path in sorted(Path(self.data_folder_in).glob(f"*.{queue}.msg")):
            taken = path.with_name(f"{uuid4().hex}.taken")
            try:
                path.rename(taken)
            except FileNotFoundError:  # another worker was faster
                continue
            message: dict[str, Any] = json.loads(taken.read_text(encoding="utf-8"))
            taken.unlink()
            return message
        raise Empty


class EmbeddedBroker(filesystem.Transport):
    """The broker that needs no server."""

    Channel = _Channel
    driver_type = "lowgad-files"
    driver_name = "lowgad-files"
