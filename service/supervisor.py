"""`lowgad up`: several commands of lowgad as child processes of one, on one machine.

Hides processes: starting, waiting until each is ready, restarting one that dies (with growing pauses), stopping all.
Each role has its own process, so that a crash or a memory spike of a computation never takes the listener down. A
child says that it is ready by one line of JSON on its standard output, and stops when its standard input ends, which
also happens when this process is killed. Must never hide that a child did not start: that ends everything, at once.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from service.core.telemetry import Log

LOG = Log("supervisor")
LOOK_SECONDS = 0.1
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
STEADY_SECONDS = 60.0  # a child that lived so long starts with the first pause again


class StartError(Exception):
    """A child ended before it was ready."""


@dataclass
class Child:
    """One role and the process that plays it.

    Args:
        role: name for logs, and key of its readiness.
        command: arguments of the process.
        variables: how its environment differs; receives the port once it is known, so that a restart keeps it.
        port_variable: name of the environment variable for the port, for roles that have one.
    """

    role: str
    command: Sequence[str]
    variables: dict[str, str] = field(default_factory=dict)
    port_variable: str = ""
    ready: threading.Event = field(default_factory=threading.Event)
    port: int | None = None
    process: subprocess.Popen[str] | None = None
    started_at: float = 0.0
    restart_at: float = 0.0
    pause_seconds: float = FIRST_PAUSE_SECONDS


def supervise(
    children: Sequence[Child],
    environ: Mapping[str, str],
    when_ready: Callable[[Mapping[str, int | None]], None],
    stop: threading.Event,
    grace_seconds: float = 20.0,
) -> None:
    """Run the children until `stop` is set.

    Args:
        children: in the order of starting; they are stopped in the same order, so list receivers first.
        environ: environment of all children.
        when_ready: called once, with the port of each role, when all are ready.
        stop: set by a signal handler.
        grace_seconds: what a child is given to stop before it is killed.

    Raises:
        StartError: a child ended before all were ready; the others have been stopped.
    """
    try:
        for child in children:
            _start(child, environ)
        while not stop.is_set() and not all(child.ready.is_set() for child in children):
            _fail_if_ended(children)
            stop.wait(LOOK_SECONDS)
        if not stop.is_set():
            when_ready({child.role: child.port for child in children})
        while not stop.wait(LOOK_SECONDS):
            for child in children:
                _keep_alive(child, environ)
    finally:
        _stop_all(children, grace_seconds)


def report_ready(stream: IO[str], port: int | None = None) -> None:
    """What a child says when it is ready."""
    stream.write(json.dumps({"ready": True, "port": port}) + "\n")
    stream.flush()


def stop_with_parent(stdin: IO[str], stop: Callable[[], None]) -> None:
    """In a child: call `stop` when the supervisor closes our standard input, or dies.

    Again and again, because a child that is still starting may not have ears for it yet.
    """

    def wait() -> None:
        stdin.read()
        while True:
            stop()
            time.sleep(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _start(child: Child, environ: Mapping[str, str]) -> None:
    child.process = subprocess.Popen(  # noqa: S603  our own command
        child.command,
        env={**environ, **child.variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches us alone, and we stop the children in order
    )
    child.started_at = time.monotonic()
    threading.Thread(target=_listen, args=(child, child.process.stdout), daemon=True).start()


def _listen(child: Child, lines: IO[str]) -> None:
    """Read a child's standard output to its end; what is not a line of ours is passed over."""
    for line in lines:
        try:
            said: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and said.get("ready"):
            child.port = said.get("port")
            if child.port and child.port_variable:
                child.variables[child.port_variable] = str(child.port)
            child.ready.set()


def _fail_if_ended(children: Sequence[Child]) -> None:
    for child in children:
        if child.process and child.process.poll() is not None:
            raise StartError(f"{child.role} ended with status {child.process.returncode} before it was ready")


def _keep_alive(child: Child, environ: Mapping[str, str]) -> None:
    now = time.monotonic()
    if child.process:
        if child.process.poll() is None:
            return
        if now - child.started_at > STEADY_SECONDS:
            child.pause_seconds = FIRST_PAUSE_SECONDS
        LOG.warning("child died; it will be restarted", role=child.role, status=child.process.returncode)
        _close(child.process)
        child.process, child.restart_at = None, now + child.pause_seconds
        child.pause_seconds = min(2 * child.pause_seconds, LONGEST_PAUSE_SECONDS)
    elif now >= child.restart_at:
        _start(child, environ)


def _stop_all(children: Sequence[Child], grace_seconds: float) -> None:
    running = [child for child in children if child.process]
    for child in running:
        if child.process and child.process.stdin:
            child.process.stdin.close()
    deadline = time.monotonic() + grace_seconds
    for child in running:
        if child.process:
            try:
                child.process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                LOG.warning("child did not stop in time and is killed", role=child.role, pid=child.process.pid)
                child.process.kill()
                child.process.wait()
            _close(child.process)


def _close(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream and not stream.closed:
            stream.close()
