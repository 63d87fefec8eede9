"""The main job on this machine, for somebody who wants to see it: phantom in by C-STORE, derived series out by C-STORE.

Hides the supporting cast: a digital phantom, `lowgad up` as a child process on free ports, and a small SCP that plays
the PACS. Must never report success unless every derived instance arrived and passed the checks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import MRImageStorage
from pynetdicom import evt

from models.simulation.phantom import make_phantom
from models.simulation.scenario import draw_scenario, with_choices
from models.volume import Array
from service.core.association import PLAIN_SYNTAXES, accepting_entity
from service.core.dicom.status import SUCCESS
from service.core.settings import Destination
from worker.deliver.sending import send, syntaxes_of
from worker.lab.montage import write_sheet
from worker.lab.phantom_study import WHITE_MATTER_LEVEL, write_phantom_study

DEADLINE_SECONDS = 900.0
SPACING_MM = 1.5
Say = Callable[[str], None]


class DemoError(Exception):
    """The demonstration did not end as it should."""


def demonstrate(out: Path, environ: Mapping[str, str], say: Say, *, seed: int = 20240306) -> None:
    """Run the demonstration.

    Args:
        out: folder; holds study/, received/, var/ and montage.png afterwards.
        environ: of this process; LOWGAD_* settings other than those the demonstration makes are passed on.
        say: told what happens, one line each.
        seed: of the phantom.

    Raises:
        DemoError: something did not start, arrive or pass its check.
    """
    for name in ("study", "received", "var"):
        shutil.rmtree(out / name, ignore_errors=True)
    study, received = out / "study", out / "received"
    say("simulating a study (digital phantom, one third of the standard dose)")
    _simulate(study, seed)
    with _pacs(received) as port, _lowgad_up(out, environ, port, say) as (listener, web):
        sources = sorted(study.glob("*/*.dcm"))
        say(f"sending {len(sources)} instances to lowgad by C-STORE")
        answers = list(
            send(syntaxes_of(sources), Destination(name="lowgad", host="127.0.0.1", port=listener, ae_title="LOWGAD"))
        )
        if not all(answer.is_sent for answer in answers):
            raise DemoError("lowgad did not accept every instance")
        job = _wait_until_delivered(web, say)
        say(f"job {job} is DELIVERED; checking what the destination holds")
        _check(study, sorted(received.glob("*.dcm")), out / "montage.png")
    say(f"derived series: {received}")
    say(f"picture:        {out / 'montage.png'}")


def _simulate(folder: Path, seed: int) -> None:
    drawn = draw_scenario(np.random.default_rng(seed))
    chosen = {"dose_fraction": 1 / 3, "noise": 0.025, "lesions": 8, "stripped": False}
    scenario = with_choices(drawn, spacing_mm=(SPACING_MM,) * 3, **chosen)
    phantom = make_phantom(seed, shape=(126, 160, 134), scenario=scenario, whole=True)
    write_phantom_study(phantom, seed, folder)


@contextmanager
def _pacs(folder: Path) -> Iterator[int]:
    """A destination that stores what it is sent; gives its port."""
    folder.mkdir(parents=True, exist_ok=True)

    def store(event: evt.Event) -> int:
        name = f"{event.file_meta.MediaStorageSOPInstanceUID}.dcm"
        (folder / Path(name).name).write_bytes(event.encoded_dataset())
        return SUCCESS

    offers = [(str(MRImageStorage), PLAIN_SYNTAXES)]
    entity = accepting_entity("DEMOPACS", offers, allowed_calling_aes=(), max_associations=4)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    if server is None or server.socket is None:
        raise DemoError("the destination did not start")
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()


@contextmanager
def _lowgad_up(out: Path, environ: Mapping[str, str], pacs_port: int, say: Say) -> Iterator[tuple[int, int]]:
    """`lowgad up` on free ports with the PACS as its destination; gives (DICOM port, web port)."""
    site = out / "site.toml"
    site.write_text(
        'default_destinations = ["demo"]\n[[destinations]]\nname = "demo"\nhost = "127.0.0.1"\n'
        f'port = {pacs_port}\nae_title = "DEMOPACS"\n',
        encoding="utf-8",
    )
    own = {
        "LOWGAD_SITE_FILE": str(site),
        "LOWGAD_LISTEN_PORT": "0",
        "LOWGAD_API_PORT": "0",
        "LOWGAD_DISK_LOW_BYTES": "0",
    }
    log = (out / "lowgad.log").open("w", encoding="utf-8")
    command = [sys.executable, "-m", "lowgad", "up", "--data-dir", str(out / "var")]
    with (
        log,
        subprocess.Popen(  # noqa: S603  our own command
            command, env=dict(environ) | own, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            ports = _read_ports(process, out / "lowgad.log", say)
            yield ports["DICOM"], ports["Web"]
        finally:
            process.terminate()
            process.wait(timeout=60)


def _read_ports(process: subprocess.Popen[str], log: Path, say: Say) -> dict[str, int]:
    ports: dict[str, int] = {}
    for line in process.stdout or ():
        say(f"  {line.rstrip()}")
        if "ready" in line:
            return ports
        name, _, rest = line.partition(" ")
        if name in {"DICOM", "Web"}:
            ports[name] = int(rest.strip().rstrip("/").rpartition(":")[2])
    raise DemoError(f"lowgad did not start; see {log}")


def _wait_until_delivered(web: int, say: Say) -> str:
    """Follow the newest job over REST; its id."""
    deadline, told = time.monotonic() + DEADLINE_SECONDS, ""
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{web}/api/v1/jobs", timeout=30) as response:
            jobs = json.load(response)["jobs"]
        if jobs:
            job = jobs[0]
            state = f"{job['state']} {job.get('stage') or ''}".strip()
            if state != told:
                told = state
                say(f"  job is {state}")
            if job["state"] == "DELIVERED":
                return str(job["id"])
            if job["state"] in {"FAILED", "REJECTED", "NEEDS_REVIEW", "CANCELLED"}:
                raise DemoError(f"the job ended as {job['state']}: {job.get('reason')} {job.get('detail')}")
        time.sleep(0.5)
    raise DemoError(f"no result within {DEADLINE_SECONDS:g} s")


def _check(study: Path, received: list[Path], montage: Path) -> None:
    """Both series whole, marked as synthetic, on their sources' grids, and nothing but added signal."""
    pre, low = (_stack(sorted((study / name).glob("*.dcm"))) for name in ("pre", "low"))
    derived: dict[str, list[Path]] = {}
    for path in received:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        if header.SyntheticData != "YES":
            raise DemoError("a derived instance is not marked as synthetic")
        derived.setdefault(str(header.SeriesDescription), []).append(path)
    plus = {name: paths for name, paths in derived.items() if "SD+" in name}
    plain = {name: paths for name, paths in derived.items() if "SD+" not in name}
    if len(plus) != 1 or len(plain) != 1:
        raise DemoError(f"expected one SD and one SD+ series, got {sorted(derived)}")
    sd = _stack(next(iter(plain.values())))
    for name, source, result in (("SD", pre, sd), ("SD+", low, _stack(next(iter(plus.values()))))):
        if result.shape != source.shape:
            raise DemoError(f"{name} has shape {result.shape}, its source {source.shape}")
        if (result < source).any() or not (result > source).any():
            raise DemoError(f"{name} is not its source plus a signal")
    truth = np.load(study / "truth.npz")["ce"].astype(np.float32) / WHITE_MATTER_LEVEL
    images = {"pre-contrast": pre, "low dose": low, "synthetic standard dose": sd}
    write_sheet(images, {"predicted signal": sd - pre, "true signal": truth}, (SPACING_MM,) * 3, montage)


def _stack(paths: list[Path]) -> Array:
    """Slices in ascending position, white matter = 1."""
    slices = sorted((pydicom.dcmread(path) for path in paths), key=lambda d: float(d.ImagePositionPatient[2]))
    return np.stack([d.pixel_array for d in slices]).astype(np.float32) / np.float32(WHITE_MATTER_LEVEL)
