from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from service.supervisor import Child, StartError, supervise
from tests.peers import wait_until

# Says that it is ready, notes its start, and waits for the end of its standard input.
GOOD = """
import json, os, sys
open(os.environ["NOTES"], "a").write(f"{os.getpid()} {os.environ.get('PORT')}\\n")
print("a banner that is no JSON")
print(json.dumps({"ready": True, "port": 4711}), flush=True)
sys.stdin.read()
open(os.environ["NOTES"], "a").write("stopped\\n")
"""
STUBBORN = GOOD.replace("import json", "import json, time").replace("sys.stdin.read()", "time.sleep(60)")


class Family:
    """A supervisor in a thread, with one child that notes what happens to it."""

    def __init__(self, folder: Path, script: str, grace_seconds: float = 20) -> None:
        self._notes, self.stop, self.ports = folder / "notes", threading.Event(), dict[str, int | None]()
        child = Child("child", [sys.executable, "-c", script], port_variable="PORT")
        environ = {**os.environ, "NOTES": str(self._notes)}
        self._thread = threading.Thread(
            target=supervise, args=([child], environ, self._ready, self.stop, grace_seconds)
        )

    def _ready(self, ports: Mapping[str, int | None]) -> None:
        self.ports.update(ports)

    def notes(self) -> list[str]:
        return self._notes.read_text().splitlines() if self._notes.exists() else []

    def __enter__(self) -> Family:
        self._thread.start()
        wait_until(lambda: self.ports, what="readiness")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., Family]:
    return lambda script, **options: Family(tmp_path, script, **options)


def test_it_is_ready_when_its_children_are_and_tells_their_ports(family: Callable[..., Family]) -> None:
    with family(GOOD) as running:
        assert running.ports == {"child": 4711}
    assert running.notes()[-1] == "stopped"


def test_a_child_that_dies_is_started_again_on_its_port(family: Callable[..., Family]) -> None:
    with family(GOOD) as running:
        pid, port = running.notes()[0].split()
        assert port == "None"
        os.kill(int(pid), 9)
        wait_until(lambda: len(running.notes()) == 2, what="a second start")
        assert running.notes()[1].endswith(" 4711")


def test_a_child_that_does_not_stop_is_killed(family: Callable[..., Family]) -> None:
    with family(STUBBORN, grace_seconds=0.5) as running:
        pid = int(running.notes()[0].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_that_ends_before_it_is_ready_ends_everything(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    children = [
        Child("good", [sys.executable, "-c", GOOD]),
        Child("bad", [sys.executable, "-c", "raise SystemExit(7)"]),
    ]
    with pytest.raises(StartError, match="bad ended with status 7"):
        supervise(children, {**os.environ, "NOTES": str(notes)}, lambda _: None, threading.Event())
    assert "stopped" in notes.read_text() or notes.read_text() == ""


def test_told_to_stop_while_starting_it_stops(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    child = Child("slow", [sys.executable, "-c", "import sys; sys.stdin.read()"])
    supervise([child], os.environ, lambda _: pytest.fail("it was never ready"), stop)
    assert child.process is not None
    assert child.process.poll() is not None
