"""Sending to a PACS, against Orthanc and against storage SCPs that refuse."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from service.core.association import associated
from service.core.errors import Permanent, Reason, Retryable
from service.core.settings import Destination
from tests.peers import MR_IMAGE_STORAGE, StorageScp, free_port, running_orthanc, running_scp
from worker.deliver.sending import Answer, Verdict, send, syntaxes_of

ENHANCED_MR_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.4.1"


def instances(folder: Path, count: int, sop_class: str = MR_IMAGE_STORAGE) -> list[Path]:
    """Small but complete MR instances of one series, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series = generate_uid(), generate_uid()
    return [_write(folder / f"{number:04}.dcm", study, series, number, sop_class) for number in range(count)]


def _write(path: Path, study: str, series: str, number: int, sop_class: str) -> Path:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.PatientID, dataset.PatientName, dataset.Modality = "1", "Test^Delivery", "MR"
    dataset.InstanceNumber = number
    dataset.Rows = dataset.Columns = 4
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.PixelData = bytes(range(32))
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return path


def at(scp: StorageScp) -> Destination:
    return Destination(name="archive", host="127.0.0.1", port=scp.port, ae_title=scp.ae_title)


def _hang_up_on_one_caller(server: socket.socket) -> None:
    server.accept()[0].close()


def verdicts(answers: list[Answer]) -> list[Verdict]:
    return [answer.verdict for answer in answers]


def test_orthanc_holds_every_instance_that_was_reported_as_sent(tmp_path: Path) -> None:
    files = instances(tmp_path / "files", 5)
    with running_orthanc(tmp_path / "orthanc") as orthanc:
        destination = Destination(name="pacs", host="127.0.0.1", port=orthanc.dicom_port, ae_title="ORTHANC")
        answers = list(send(syntaxes_of(files), destination))
        again = list(send(syntaxes_of(files), destination))
        held = orthanc.sop_instance_uids()
    assert verdicts(answers) == verdicts(again) == [Verdict.SENT] * 5
    assert [answer.path for answer in answers] == files
    assert held == {str(pydicom.dcmread(path).SOPInstanceUID) for path in files}


def test_an_association_is_released_when_the_work_is_done_and_aborted_when_it_is_cut_short() -> None:
    offers = [(MR_IMAGE_STORAGE, [str(ExplicitVRLittleEndian)])]
    with running_scp() as scp:
        with associated(at(scp), offers, calling_ae_title="LOWGAD") as done:
            assert done.is_established
        with pytest.raises(KeyboardInterrupt), associated(at(scp), offers, calling_ae_title="LOWGAD") as cut_short:
            raise KeyboardInterrupt
    assert (done.is_released, done.is_aborted) == (True, False)
    assert (cut_short.is_released, cut_short.is_aborted) == (False, True)


def test_warning_statuses_count_as_sent_and_are_recorded(tmp_path: Path) -> None:
    with running_scp(statuses=[0xB000, 0xB006, 0xB007]) as scp:
        answers = list(send(syntaxes_of(instances(tmp_path, 4)), at(scp)))
    assert verdicts(answers) == [Verdict.SENT_WITH_WARNING] * 3 + [Verdict.SENT]
    assert [answer.status for answer in answers] == [0xB000, 0xB006, 0xB007, 0x0000]
    assert answers[0].text == "0xB000 stored; the destination coerced data elements"
    assert all(answer.is_sent for answer in answers)


def test_a_refused_instance_does_not_stop_the_others(tmp_path: Path) -> None:
    with running_scp(statuses=[0x0000, 0xA900, 0xC123, 0x0124]) as scp:
        answers = list(send(syntaxes_of(instances(tmp_path, 5)), at(scp)))
    assert verdicts(answers) == [Verdict.SENT, Verdict.REFUSED, Verdict.REFUSED, Verdict.REFUSED, Verdict.SENT]


def test_an_archive_short_of_space_is_worth_another_attempt(tmp_path: Path) -> None:
    with running_scp(statuses=[0xA700, 0x0110, 0x0213]) as scp:
        answers = list(send(syntaxes_of(instances(tmp_path, 3)), at(scp)))
    assert verdicts(answers) == [Verdict.BUSY] * 3


def test_an_archive_that_already_holds_the_instance_counts_as_sent(tmp_path: Path) -> None:
    with running_scp(statuses=[0x0111]) as scp:
        answers = list(send(syntaxes_of(instances(tmp_path, 1)), at(scp)))
    assert verdicts(answers) == [Verdict.SENT_WITH_WARNING]


def test_a_destination_that_nobody_listens_at_is_retried(tmp_path: Path) -> None:
    destination = Destination(name="gone", host="127.0.0.1", port=free_port(), ae_title="GONE")
    with pytest.raises(Retryable) as caught:
        list(send(syntaxes_of(instances(tmp_path, 1)), destination))
    assert caught.value.reason is Reason.DESTINATION_UNREACHABLE


def test_a_rejected_association_is_final(tmp_path: Path) -> None:
    with running_scp(called_ae_required=True) as scp, pytest.raises(Permanent) as caught:
        list(send(syntaxes_of(instances(tmp_path, 1)), at(scp).model_copy(update={"ae_title": "SOMEBODY"})))
    assert caught.value.reason is Reason.DESTINATION_REFUSED
    assert "Called AE title not recognised" in caught.value.detail


def test_a_destination_that_takes_no_mr_is_final(tmp_path: Path) -> None:
    with running_scp(sop_classes=["1.2.840.10008.5.1.4.1.1.2"]) as scp, pytest.raises(Permanent) as caught:
        list(send(syntaxes_of(instances(tmp_path, 1)), at(scp)))
    assert caught.value.reason is Reason.DESTINATION_REFUSED
    assert "MR Image Storage" in caught.value.detail


def test_instances_without_an_accepted_context_are_refused_one_by_one(tmp_path: Path) -> None:
    files = instances(tmp_path / "mr", 1) + instances(tmp_path / "enhanced", 1, ENHANCED_MR_IMAGE_STORAGE)
    with running_scp() as scp:
        answers = list(send(syntaxes_of(files), at(scp)))
    assert verdicts(answers) == [Verdict.SENT, Verdict.REFUSED]
    assert answers[1].status is None


def test_a_destination_that_knows_only_implicit_vr_is_served(tmp_path: Path) -> None:
    with running_scp(transfer_syntaxes=[ImplicitVRLittleEndian]) as scp:
        answers = list(send(syntaxes_of(instances(tmp_path, 1)), at(scp)))
    assert verdicts(answers) == [Verdict.SENT]
    assert scp.transfer_syntaxes == [ImplicitVRLittleEndian]


def test_what_was_answered_before_the_association_broke_stays_answered(tmp_path: Path) -> None:
    with running_scp(abort_after=2) as scp:
        answers = send(syntaxes_of(instances(tmp_path, 4)), at(scp))
        assert verdicts([next(answers), next(answers)]) == [Verdict.SENT] * 2
        with pytest.raises(Retryable) as caught:
            next(answers)
    assert caught.value.reason is Reason.DESTINATION_UNREACHABLE
    assert len(scp.received) == 2


def test_a_destination_that_hangs_up_at_once_is_retried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_hang_up_on_one_caller, args=(server,), daemon=True).start()
        destination = Destination(name="x", host="127.0.0.1", port=server.getsockname()[1], ae_title="X")
        with pytest.raises(Retryable):
            list(send(syntaxes_of(instances(tmp_path, 1)), destination))


def test_a_result_file_that_has_gone_is_refused_and_the_rest_is_sent(tmp_path: Path) -> None:
    files = [*instances(tmp_path, 2), tmp_path / "gone.dcm"]
    with running_scp() as scp:
        answers = {answer.path: answer.verdict for answer in send(syntaxes_of(files), at(scp))}
    assert answers == {files[0]: Verdict.SENT, files[1]: Verdict.SENT, files[2]: Verdict.REFUSED}
