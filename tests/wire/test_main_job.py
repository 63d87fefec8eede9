"""The main job through both doors, with dcmtk as the modality, `lowgad up`, and Orthanc as the PACS.

The real pair is used where it is at hand (it is not part of the project); a phantom everywhere else.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner

import lowgad
from models.evaluation.metrics import score
from service.core.job import State
from tests.dicom3tools import errors_of, inconsistencies
from tests.numeric.phantoms import head
from tests.peers import Orthanc, running_orthanc, wait_until
from tests.up import STORESCU, Up, running
from worker.lab.phantom_study import write_phantom_study

DATA = Path(__file__).parents[3] / "shared" / "data"
REAL_STUDY, REAL_TRUTH = DATA / "tcga-du-7294-lowdose33.zip", DATA / "tcga-du-7294-truth.npz"
needs_the_real_pair = pytest.mark.skipif(not REAL_STUDY.exists(), reason="the real pair is not at hand")
SECONDS = 300.0


@pytest.fixture(scope="module")
def phantom_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom_study(head(stripped=False), 3, folder)
    return folder


@pytest.fixture(scope="module")
def real_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    with zipfile.ZipFile(REAL_STUDY) as archive:
        archive.extractall(folder)
    return folder


@contextmanager
def hospital(folder: Path) -> Iterator[tuple[Up, Orthanc]]:
    """`lowgad up` with the network as engine, and an Orthanc it delivers to."""
    with running_orthanc(folder / "orthanc") as orthanc:
        site = folder / "site.toml"
        site.write_text(
            'default_destinations = ["pacs"]\n[[destinations]]\nname = "pacs"\nhost = "127.0.0.1"\n'
            f'port = {orthanc.dicom_port}\nae_title = "{orthanc.ae_title}"\n'
        )
        with running(folder, engine="network", site_file=str(site), disk_low_bytes="0", quiet_seconds="2") as up:
            yield up, orthanc


def delivered(up: Up) -> bool:
    states = [job.state for job in up.jobs()]
    assert not {State.FAILED, State.REJECTED, State.NEEDS_REVIEW} & set(states), [job.detail for job in up.jobs()]
    return states == [State.DELIVERED]


def instances(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.dcm"))


def series_in(orthanc: Orthanc) -> dict[str, list[str]]:
    """SeriesDescription to the instances of each series."""
    found = orthanc.get("/series?expand")
    return {series["MainDicomTags"]["SeriesDescription"]: series["Instances"] for series in found}


@pytest.mark.skipif(not STORESCU.exists(), reason="dcmtk is not installed")
def test_a_study_sent_by_c_store_comes_back_as_two_derived_series_and_a_second_time_changes_nothing(
    tmp_path: Path, phantom_study: Path
) -> None:
    with hospital(tmp_path) as (up, orthanc):
        up.send(*instances(phantom_study))
        wait_until(lambda: delivered(up), SECONDS, "delivery")
        first = orthanc.sop_instance_uids()
        series = series_in(orthanc)
        preview = httpx.get(f"http://127.0.0.1:{orthanc.http_port}/instances/{next(iter(series.values()))[48]}/preview")
        up.send(*instances(phantom_study))
        again = httpx.post(f"{up.web}api/v1/jobs/{up.jobs()[0].id}/rerun", timeout=30)
        wait_until(lambda: delivered(up), SECONDS, "the second delivery")
        assert {name: len(found) for name, found in series.items()} == {
            "AI SYNTH T1+C SD - NOT ACQUIRED": 96,
            "AI SYNTH T1+C SD+ - NOT ACQUIRED": 96,
        }
        assert preview.status_code == 200
        assert again.is_success
        assert orthanc.sop_instance_uids() == first


def test_a_zip_is_processed_on_redis_and_postgresql_and_the_result_downloaded_as_a_zip(
    tmp_path: Path, phantom_study: Path, redis_url: str, postgres_url: str
) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in instances(phantom_study):
            archive.write(path, path.relative_to(phantom_study))
    places = {"broker_url": redis_url, "database_url": postgres_url}
    with running(tmp_path, engine="network", disk_low_bytes="0", **places) as up:
        upload = {"files": ("study.zip", packed.getvalue(), "application/zip")}
        answer = httpx.post(f"{up.web}api/v1/studies", files=upload, timeout=60)
        assert answer.status_code == 202, answer.text
        job = f"{up.web}api/v1/jobs/{answer.json()['id']}"
        wait_until(lambda: httpx.get(job).json()["state"] == "COMPUTED", SECONDS, "the result")
        second = httpx.post(f"{up.web}api/v1/studies", files=upload, timeout=60)
        result = httpx.get(f"{job}/result", timeout=60)
        assert second.status_code == 200
        assert second.json()["id"] == answer.json()["id"]
        names = zipfile.ZipFile(io.BytesIO(result.content)).namelist()
        assert sum(name.startswith("sd/") for name in names) == 96
        assert sum(name.startswith("sd_plus/") for name in names) == 96
        assert "report.json" in names


@needs_the_real_pair
@pytest.mark.skipif(not STORESCU.exists(), reason="dcmtk is not installed")
def test_the_real_pair_sent_by_dcmtk_arrives_in_orthanc_as_two_whole_series(tmp_path: Path, real_study: Path) -> None:
    with hospital(tmp_path) as (up, orthanc):
        up.send(*instances(real_study))
        wait_until(lambda: delivered(up), SECONDS, "delivery")
        series = series_in(orthanc)
        assert sorted(map(len, series.values())) == [155, 155]
        tags = orthanc.get(f"/instances/{series['AI SYNTH T1+C SD - NOT ACQUIRED'][0]}/tags")
        assert tags["0008,001c"]["Value"] == "YES"  # Synthetic Data
        assert tags["0018,1041"]["Value"] == "4.95"  # the volume that was injected


@needs_the_real_pair
def test_the_real_pair_run_offline_gives_valid_dicom_and_believable_enhancement(
    tmp_path: Path, real_study: Path
) -> None:
    done = CliRunner().invoke(lowgad.main, ["run", str(real_study), "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    derived = instances(tmp_path)
    assert len(derived) == 310
    assert [error for path in derived[::10] for error in errors_of(path)] == []
    assert inconsistencies([*instances(real_study), *derived]) == ""
    assert json.loads((tmp_path / "report.json").read_text())["outcome"] == "DONE"
    signal = stacked(instances(tmp_path / "sd")) - stacked(sorted(real_study.glob("5_*.dcm")))
    assert signal.min() >= 0
    truth = np.load(REAL_TRUTH)
    figures = score(signal / 900, truth["ce"] / 900, truth["brain"], (1.0, 1.0, 1.0))
    assert figures is not None
    # Wide: they catch a broken pipeline, not a worse network; the figures themselves are in the model card.
    assert figures.ce_error < 0.18
    assert 0.35 < figures.slope < 1.3
    assert figures.false_per_ml < 2.0


def stacked(paths: list[Path]) -> np.ndarray:
    """Stored values (k, j, i) as float32, k in ascending position."""
    slices = sorted(map(pydicom.dcmread, paths), key=lambda one: float(one.ImagePositionPatient[2]))
    return np.stack([one.pixel_array for one in slices]).astype(np.float32)
