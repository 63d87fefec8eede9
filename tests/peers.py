"""Real peers for the wire tests, on loopback and ephemeral ports: Orthanc, and an SCP that answers as it is told."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE, evt

MR_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float = 30.0, what: str = "the condition") -> None:
    """Poll until `condition` is true; fail the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come true within {seconds:g} s")
        time.sleep(0.02)


@dataclass(frozen=True)
class Orthanc:
    """A running Orthanc."""

    dicom_port: int
    http_port: int
    ae_title: str = "ORTHANC"

    def get(self, path: str) -> Any:
        """What its REST API answers, decoded."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=10) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        """What its REST API answers to JSON, decoded."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as answer:
            return json.load(answer)

    def sop_instance_uids(self) -> set[str]:
        """The instances it holds."""
        return {entry["MainDicomTags"]["SOPInstanceUID"] for entry in self.get("/instances?expand")}


@contextmanager
def running_orthanc(folder: Path, **overrides: Any) -> Iterator[Orthanc]:
    """Debian's Orthanc with its storage below `folder`; skips the test where it is not installed."""
    program = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("Orthanc is not installed")
    orthanc = Orthanc(free_port(), free_port())
    folder.mkdir(parents=True, exist_ok=True)
    configuration = {
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "HttpPort": orthanc.http_port,
        "DicomPort": orthanc.dicom_port,
        "DicomAet": orthanc.ae_title,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowStore": True,
        "Plugins": [],
        **overrides,
    }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            wait_until(lambda: _answers(orthanc), what="Orthanc's start")
            yield orthanc
        finally:
            process.terminate()
            process.wait(timeout=20)


def _answers(orthanc: Orthanc) -> bool:
    try:
        return bool(orthanc.get("/system"))
    except (urllib.error.URLError, ConnectionError):
        return False


@dataclass
class StorageScp:
    """A running storage SCP: what it received, and how it answers."""

    port: int
    ae_title: str
    statuses: list[int] = field(default_factory=list)  # answered in turn; then `default_status`
    default_status: int = 0x0000
    received: list[str] = field(default_factory=list)  # SOPInstanceUIDs, in order
    transfer_syntaxes: list[str] = field(default_factory=list)
    on_received: Callable[[], object] = lambda: None  # called before each answer
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def running_scp(
    *,
    ae_title: str = "ARCHIVE",
    sop_classes: Sequence[str] = (MR_IMAGE_STORAGE,),
    transfer_syntaxes: Sequence[str] = (EXPLICIT_VR_LITTLE_ENDIAN,),
    statuses: Sequence[int] = (),
    called_ae_required: bool = False,
    abort_after: int | None = None,
) -> Iterator[StorageScp]:
    """A pynetdicom SCP. `abort_after` drops the association after so many answers."""
    scp = StorageScp(0, ae_title, list(statuses))

    def on_store(event: evt.Event) -> int:
        with scp.lock:
            if abort_after is not None and len(scp.received) >= abort_after:
                event.assoc.abort()
                return 0x0000
            scp.received.append(str(event.request.AffectedSOPInstanceUID))
            scp.transfer_syntaxes.append(str(event.context.transfer_syntax))
            scp.on_received()
            return scp.statuses.pop(0) if scp.statuses else scp.default_status

    entity = AE(ae_title=ae_title)
    entity.require_called_aet = called_ae_required
    for sop_class in sop_classes:
        entity.add_supported_context(sop_class, list(transfer_syntaxes))
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, on_store)])
    scp.port = int(server.server_address[1])
    try:
        yield scp
    finally:
        server.shutdown()
