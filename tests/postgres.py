"""A throw-away PostgreSQL server from Debian's binaries, on loopback, never as root."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

STARTS_WITHIN_SECONDS = 30
USER = "postgres"


def binaries() -> Path | None:
    """The newest installed server's folder of programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


@contextlib.contextmanager
def server(programs: Path) -> Iterator[str]:
    """Run a server; gives its URL without a database name."""
    folder = Path(tempfile.mkdtemp(prefix="lowgad-postgres-"))
    as_user = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
    if as_user:
        shutil.chown(folder, USER, USER)
    port = _free_port()
    initialise = [programs / "initdb", "-D", folder / "data", "-U", "test", "-A", "trust", "--no-sync"]
    start = [programs / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"]
    with (folder / "log").open("wb") as log:
        subprocess.run(initialise, check=True, stdout=log, stderr=log, cwd=folder, **as_user)  # type: ignore[call-overload]
        process = subprocess.Popen(start, stdout=log, stderr=log, cwd=folder, **as_user)  # type: ignore[call-overload]
    try:
        _wait_until_it_answers(port, process)
        yield f"postgresql://test@127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_it_answers(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_SECONDS
    while True:
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="test", dbname="postgres", connect_timeout=2).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
