"""Every kind of result in a real archive: sent by C-STORE and STOW-RS, found by QIDO-RS, read back equal by WADO-RS."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dicomweb_client.api import DICOMwebClient
from pydicom import dcmread
from pydicom.dataset import Dataset

from service.core.job import Kind
from service.core.settings import Destination
from tests.factories.reading import paired
from tests.factories.results import ALL, findings_of, saved
from tests.peers import Orthanc, running_orthanc, running_scp
from worker.compose.results import STORED_AS, compose
from worker.deliver.sending import Verdict, send, syntaxes_of

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
MODALITIES = {
    Kind.PARAMETRIC_MAP: "MR",
    Kind.SEGMENTATION: "SEG",
    Kind.STRUCTURED_REPORT: "SR",
    Kind.PRESENTATION_STATE: "PR",
}


@contextmanager
def archive(folder: Path) -> Iterator[tuple[Orthanc, DICOMwebClient]]:
    if not PLUGIN.exists():
        pytest.skip("Orthanc's DICOMweb plugin is not installed")
    with running_orthanc(folder, Plugins=[str(PLUGIN)], DicomWeb={"Enable": True, "Root": "/dicom-web/"}) as orthanc:
        yield orthanc, DICOMwebClient(f"http://127.0.0.1:{orthanc.http_port}/dicom-web")


def files(folder: Path) -> dict[str, list[Path]]:
    """All kinds of one job, with their watermark, as files."""
    made = compose(findings_of(paired(folder / "in", plane="oblique")), ALL)
    return {name: saved(folder / name, found) for name, found in made.items()}


def read_back(client: DICOMwebClient, one: Dataset) -> Dataset:
    return client.retrieve_instance(one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID)


def found_series(client: DICOMwebClient, study_uid: str) -> dict[str, tuple[str, str]]:
    """SeriesInstanceUID to modality and description."""
    return {
        item["0020000E"]["Value"][0]: (item["00080060"]["Value"][0], item["0008103E"]["Value"][0])
        for item in client.search_for_series(study_uid)
    }


def test_all_kinds_sent_by_c_store_are_found_and_read_back_equal(tmp_path: Path) -> None:
    results = files(tmp_path)
    with archive(tmp_path / "orthanc") as (orthanc, client):
        destination = Destination(name="pacs", host="127.0.0.1", port=orthanc.dicom_port, ae_title="ORTHANC")
        answers = list(send(syntaxes_of(itertools.chain(*results.values())), destination))
        assert {answer.verdict for answer in answers} == {Verdict.SENT}
        check_held(client, results)


def test_all_kinds_stored_by_stow_are_found_and_read_back_equal(tmp_path: Path) -> None:
    results = files(tmp_path)
    with archive(tmp_path / "orthanc") as (_, client):
        sent = [dcmread(path) for path in itertools.chain(*results.values())]
        answer = client.store_instances(sent)
        assert not answer.get("FailedSOPSequence")
        assert len(answer.ReferencedSOPSequence) == len(sent)
        check_held(client, results)


def check_held(client: DICOMwebClient, results: dict[str, list[Path]]) -> None:
    series = found_series(client, str(dcmread(next(iter(results.values()))[0]).StudyInstanceUID))
    assert len(series) == len(Kind)
    for name, paths in results.items():
        for path in paths:
            expected = dcmread(path)
            modality = MODALITIES.get(Kind(name), "MR")
            assert series[expected.SeriesInstanceUID] == (modality, expected.SeriesDescription)
            assert read_back(client, expected) == expected


def test_a_destination_that_takes_images_alone_gets_them_and_refuses_the_rest(tmp_path: Path) -> None:
    results = files(tmp_path)
    with running_scp() as scp:
        destination = Destination(name="pacs", host="127.0.0.1", port=scp.port, ae_title=scp.ae_title)
        answers = {
            answer.path: answer.verdict for answer in send(syntaxes_of(itertools.chain(*results.values())), destination)
        }
    for name, found in results.items():
        images = STORED_AS[Kind(name)].name == "MR Image Storage"
        assert {answers[path] for path in found} == {Verdict.SENT if images else Verdict.REFUSED}
