from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.core.job import JobOptions
from service.core.ledger import Ledger
from service.core.queue import DELIVER, PROCESS, enqueue, is_reachable, make_celery, send
from service.core.settings import Settings
from tests.conftest import Clock
from tests.peers import free_port, wait_until

# A worker as small as can be: it writes down which job ids it was given.
WORKER = """
    import sys
    from pathlib import Path
    from service.core.queue import make_celery
    from service.core.settings import Settings

    data_dir, broker_url, notes, names = sys.argv[1:]
    app = make_celery(Settings(data_dir=Path(data_dir), broker_url=broker_url))

    def note(task, job_id):
        with open(notes, "a") as file:
            file.write(f"{task} {job_id}\\n")

    @app.task(name="process")
    def process(job_id):
        note("process", job_id)

    @app.task(name="deliver")
    def deliver(job_id):
        note("deliver", job_id)

    app.worker_main(["worker", "-P", "solo", "-Q", names, "--without-gossip", "--without-mingle", "-l", "ERROR"])
"""


@pytest.fixture(params=["embedded", "redis"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    url = "embedded" if request.param == "embedded" else request.getfixturevalue("redis_url")
    return Settings(data_dir=tmp_path / "var", broker_url=url)


@contextmanager
def worker(settings: Settings, notes: Path, queues: str) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [str(settings.data_dir), settings.broker_url, str(notes), queues]
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WORKER), *arguments])
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def read(notes: Path) -> list[str]:
    return notes.read_text().splitlines() if notes.exists() else []


def test_messages_reach_the_worker_of_their_queue_once_and_in_order(settings: Settings, tmp_path: Path) -> None:
    app, computed, sent = make_celery(settings), tmp_path / "computed", tmp_path / "sent"
    assert all(send(app, PROCESS, f"job{number}") for number in range(5))
    assert send(app, DELIVER, "job9")
    with worker(settings, computed, "process"), worker(settings, sent, "deliver"):
        wait_until(lambda: len(read(computed)) == 5 and len(read(sent)) == 1, what="six messages")
    assert read(computed) == [f"process job{number}" for number in range(5)]
    assert read(sent) == ["deliver job9"]


def test_two_workers_on_one_queue_share_the_messages(settings: Settings, tmp_path: Path) -> None:
    app, notes = make_celery(settings), tmp_path / "notes"
    with worker(settings, notes, "process"), worker(settings, notes, "process"):
        for number in range(40):
            send(app, PROCESS, f"job{number:02}")
        wait_until(lambda: len(read(notes)) >= 40, what="forty messages")
    assert sorted(read(notes)) == [f"process job{number:02}" for number in range(40)]


def test_a_broker_that_is_away_is_reported_and_raises_nothing() -> None:
    app = make_celery(Settings(broker_url=f"redis://127.0.0.1:{free_port()}/0"))
    assert not is_reachable(app)
    assert not send(app, PROCESS, "job")


def test_what_was_enqueued_is_noted_in_the_ledger_and_what_was_not_is_due_again(tmp_path: Path, clock: Clock) -> None:
    settings = Settings(data_dir=tmp_path)
    away = settings.model_copy(update={"broker_url": f"redis://127.0.0.1:{free_port()}/0"})
    with Ledger.open(settings.ledger_url, clock) as ledger:
        job, _ = ledger.jobs.create("1.2.3", [], JobOptions(), "rest")
        assert not enqueue(make_celery(away), ledger, job)
        assert ledger.jobs.due(60) == [job]
        assert enqueue(make_celery(settings), ledger, job)
        assert ledger.jobs.due(60) == []
    assert len(list(settings.broker_dir.glob("*.process.msg"))) == 1


def test_a_broker_that_answers_is_reachable(settings: Settings) -> None:
    assert is_reachable(make_celery(settings))


def test_a_message_carries_the_id_of_a_job_and_nothing_else(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    send(make_celery(settings), PROCESS, "0123456789abcdef")
    [message] = settings.broker_dir.glob("*.msg")
    headers = json.loads(message.read_text())["headers"]
    assert headers["argsrepr"] == "['0123456789abcdef']"
    assert headers["kwargsrepr"] == "{}"
