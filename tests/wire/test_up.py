from __future__ import annotations

import os
import signal
import socket
from contextlib import closing
from pathlib import Path

import httpx2 as httpx
import pytest

from service.core.job import State
from tests.factories import write_study
from tests.peers import wait_until
from tests.up import STORESCU, running

FINAL = {State.COMPUTED, State.NEEDS_REVIEW, State.REJECTED, State.FAILED}


def is_alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not STORESCU.exists(), reason="dcmtk is not installed")
def test_a_study_sent_to_lowgad_up_is_processed_though_its_worker_and_listener_are_killed(tmp_path: Path) -> None:
    paths = write_study(tmp_path / "study")
    with running(tmp_path, settle_seconds="0.5", sweep_seconds="0.2", lease_seconds="2", retry_seconds="0.1") as up:
        assert httpx.get(f"{up.web}readyz").json()["status"] == "ready"
        before = up.children()
        assert sorted(before) == ["api", "listen", "work deliver", "work process"]
        for role in ("work process", "listen"):
            os.kill(before[role], signal.SIGKILL)
            wait_until(lambda role=role: up.children().get(role, before[role]) != before[role], what=f"{role} again")
        wait_until(lambda: accepts(up.dicom_port), what="the listener on its old port")
        up.send(*paths)
        wait_until(lambda: [job.state in FINAL for job in up.jobs()] == [True], 90, what="the end of the job")
        assert up.children().keys() == before.keys()
        assert up.children()["api"] == before["api"]


def accepts(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_told_to_stop_it_stops_its_children_and_itself(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        pids = up.children().values()
        assert len(pids) == 4
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(60) == 0
        assert not any(is_alive(pid) for pid in pids)


def test_killed_it_leaves_no_children_behind(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        pids = list(up.children().values())
        up.process.kill()
        wait_until(lambda: not any(is_alive(pid) for pid in pids), 60, what="the end of the children")


def test_a_port_that_is_taken_ends_the_start_and_is_named(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        with running(tmp_path, listen_port=port) as up:
            assert up.process.wait(60) == 1
            assert up.said == []
    log = (tmp_path / "log").read_text()
    assert f"cannot listen on 127.0.0.1:{port}" in log
    assert "listener ended with status 1 before it was ready" in log
    assert "Traceback" not in log


def test_an_unknown_setting_ends_the_start_with_one_line(tmp_path: Path) -> None:
    with running(tmp_path, listen_prot="1") as up:
        assert up.process.wait(60) == 1
    assert (tmp_path / "log").read_text().splitlines() == [
        "Error: unknown setting LOWGAD_LISTEN_PROT; did you mean LOWGAD_LISTEN_PORT?"
    ]
