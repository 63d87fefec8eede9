"""The whole product as a process: `lowgad up` on loopback and ephemeral ports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from service.core.job import Job
from service.core.ledger import Ledger
from service.core.settings import Settings

STORESCU = Path("/usr/bin/storescu")


@dataclass
class Up:
    """A running `lowgad up`."""

    process: subprocess.Popen[str]
    settings: Settings
    said: list[str] = field(default_factory=list)

    @property
    def dicom_port(self) -> int:
        """Where its listener listens."""
        return int(self.said[0].rpartition(":")[2])

    @property
    def web(self) -> str:
        """The address of its API and dashboard."""
        return self.said[1].split()[1]

    def children(self) -> dict[str, int]:
        """Pid by role, read from the processes themselves."""
        roles = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            roles[" ".join(word for word in words[3:] if word and not word.startswith("--"))] = int(pid)
        return roles

    def jobs(self) -> list[Job]:
        """What its ledger holds."""
        with Ledger.open(self.settings.ledger_url) as ledger:
            return ledger.jobs.page()

    def send(self, *paths: Path) -> None:
        """Send files as a modality does, with dcmtk."""
        command = [STORESCU, "-aec", "LOWGAD", "127.0.0.1", str(self.dicom_port), *paths]
        assert subprocess.run(command, check=False, timeout=60).returncode == 0


@contextmanager
def running(folder: Path, **variables: str) -> Iterator[Up]:
    """`lowgad up` with its data and its log in `folder`, on ports of its own; `variables` are settings by name."""
    named = {f"LOWGAD_{name.upper()}": value for name, value in variables.items()}
    environ = {**os.environ, "LOWGAD_LISTEN_PORT": "0", "LOWGAD_API_PORT": "0", "LOWGAD_ENGINE": "linear", **named}
    command = [sys.executable, "-m", "lowgad", "up", "--data-dir", str(folder / "var")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True)
    up = Up(process, Settings(data_dir=folder / "var"))
    assert process.stdout is not None
    try:
        for line in process.stdout:
            up.said.append(line.strip())
            if "is ready" in line:
                break
        yield up
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
