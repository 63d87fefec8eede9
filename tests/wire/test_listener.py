from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import DataElement, dcmread
from pydicom.config import IGNORE
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
)
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode

from service.core.ledger import Ledger
from service.core.settings import Settings
from service.core.spool import Spool
from tests.factories import make_pair, uid, write_study
from tests.peers import wait_until

MR, ENHANCED_MR, CT = (UID(f"1.2.840.10008.5.1.4.1.1.{end}") for end in ("4", "4.1", "2"))
VERIFICATION = UID("1.2.840.10008.1.1")
STORESCU, ECHOSCU = Path("/usr/bin/storescu"), Path("/usr/bin/echoscu")  # dcmtk's; pynetdicom brings others

needs_dcmtk = pytest.mark.skipif(not STORESCU.exists(), reason="dcmtk is not installed")


@dataclass
class Running:
    """A listener in a process of its own."""

    settings: Settings
    variables: dict[str, str]
    port: int = 0
    process: subprocess.Popen[str] | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.settings.data_dir / "log"

    def start(self) -> None:
        environ = {**os.environ, **self.variables, "LOWGAD_DATA_DIR": str(self.settings.data_dir)}
        command = [sys.executable, "-m", "lowgad", "listen", "--supervised"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        self.port = json.loads(self.process.stdout.readline())["port"]

    def kill(self) -> None:
        """As a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.close()

    def close(self) -> None:
        assert self.process is not None
        for stream in (self.process.stdin, self.process.stdout):
            if stream and not stream.closed:
                stream.close()
        self.process.wait(30)

    def memory_mib(self) -> int:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) // 1024

    def stored(self) -> dict[str, bytes]:
        """SOPInstanceUID -> file, for everything that ledger and spool hold together."""
        spool = Spool(self.settings.spool_dir)
        with closing(sqlite3.connect(self.settings.data_dir / "ledger.sqlite")) as database:
            rows = database.execute("SELECT sop_instance_uid, sha256 FROM instances").fetchall()
        return {name: spool.path(sha256).read_bytes() for name, sha256 in rows}

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextmanager
def listening(folder: Path, **variables: str) -> Iterator[Running]:
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"LOWGAD_{name.upper()}": value for name, value in variables.items()}
    running = Running(Settings(data_dir=folder), {"LOWGAD_LISTEN_PORT": "0", **named})
    running.start()
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One listener for all tests that send different studies and change nothing else."""
    with listening(tmp_path_factory.mktemp("listener"), receive_timeout_seconds="2") as running:
        yield running


@contextmanager
def associated(
    port: int,
    contexts: Sequence[tuple[UID, UID]] = ((MR, ExplicitVRLittleEndian),),
    calling: str = "MODALITY",
    called: str = "LOWGAD",
) -> Iterator[Association]:
    entity = AE(ae_title=calling)
    entity.dimse_timeout = 5  # a peer that was killed does not answer
    for sop_class, syntax in contexts:
        entity.add_requested_context(sop_class, syntax)
    association = entity.associate("127.0.0.1", port, ae_title=called)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def sendable(dataset: Dataset) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    return dataset


def store(running: Running, *datasets: Dataset, calling: str = "MODALITY") -> list[int]:
    with associated(running.port, calling=calling) as association:
        assert association.is_established
        return [association.send_c_store(sendable(dataset)).Status for dataset in datasets]


def study(seed: int, count: int = 3) -> list[Dataset]:
    return make_pair(seed=seed, slices=count, rows=16, columns=16).pre


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False)


# --- the normal case --------------------------------------------------------------------------------------------------


@needs_dcmtk
def test_dcmtk_can_verify_the_connection(shared: Running) -> None:
    assert run(ECHOSCU, "-aec", "LOWGAD", "127.0.0.1", shared.port).returncode == 0


@needs_dcmtk
@pytest.mark.parametrize("option", ["-xe", "-xi"])
def test_what_dcmtk_sends_is_stored_to_the_last_byte(shared: Running, tmp_path: Path, option: str) -> None:
    seed = 100 + len(option) + ord(option[-1])
    paths = write_study(tmp_path, seed=seed, implicit=option == "-xi")
    sent = run(STORESCU, option, "-aec", "LOWGAD", "127.0.0.1", shared.port, *paths)
    assert sent.returncode == 0, sent.stderr
    stored = shared.stored()
    for path in paths:
        original = dcmread(path)
        again = dcmread(BytesIO(stored[original.SOPInstanceUID]))
        assert again == original
        assert again.file_meta.TransferSyntaxUID == original.file_meta.TransferSyntaxUID


def test_success_means_that_ledger_and_spool_have_it(shared: Running) -> None:
    datasets = study(1)
    with associated(shared.port) as association:
        for dataset in datasets:
            assert association.send_c_store(sendable(dataset)).Status == 0x0000
            assert dataset.SOPInstanceUID in shared.stored()


def test_several_modalities_may_send_at_once(shared: Running) -> None:
    senders = [make_pair(seed=300 + number, slices=5).pre for number in range(8)]
    opened = [AE(ae_title=f"MR{number}") for number in range(8)]
    for entity in opened:
        entity.add_requested_context(MR, ExplicitVRLittleEndian)
    associations = [entity.associate("127.0.0.1", shared.port, ae_title="LOWGAD") for entity in opened]
    for index in range(5):
        for association, datasets in zip(associations, senders, strict=True):
            assert association.send_c_store(sendable(datasets[index])).Status == 0x0000
    for association in associations:
        association.release()
    assert {dataset.SOPInstanceUID for datasets in senders for dataset in datasets} <= shared.stored().keys()


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_the_same_image_twice_is_a_success_and_stored_once(shared: Running) -> None:
    [dataset] = study(2, count=1)
    assert store(shared, dataset, dataset) == [0x0000, 0x0000]
    assert store(shared, dataset, calling="OTHER") == [0x0000]


def test_another_image_under_a_known_uid_is_refused_and_the_first_is_kept(shared: Running) -> None:
    [first], [second] = study(3, count=1), study(3, count=1)
    second.PixelData = bytes(len(second.PixelData))
    assert store(shared, first, second) == [0x0000, 0xC101]
    assert dcmread(BytesIO(shared.stored()[first.SOPInstanceUID])).PixelData == first.PixelData


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_dangerous_or_retired_transfer_syntaxes_are_not_negotiated(shared: Running, syntax: UID) -> None:
    with associated(shared.port, [(MR, syntax), (VERIFICATION, ExplicitVRLittleEndian)]) as association:
        assert [context.abstract_syntax for context in association.accepted_contexts] == [VERIFICATION]


def test_only_mr_is_negotiated(shared: Running) -> None:
    wanted = [(CT, ExplicitVRLittleEndian), (MR, JPEG2000Lossless), (ENHANCED_MR, ExplicitVRLittleEndian)]
    with associated(shared.port, wanted) as association:
        assert {context.abstract_syntax for context in association.accepted_contexts} == {MR, ENHANCED_MR}


@pytest.mark.parametrize("changes", [{"SOPInstanceUID": uid("another")}, {"SOPClassUID": CT}])
def test_a_data_set_that_is_not_what_the_command_announces_is_refused(shared: Running, changes: dict[str, str]) -> None:
    [announced], [sent] = study(4, count=1), study(4, count=1)
    sent.update(changes)
    with associated(shared.port) as association:
        assert send_under_the_name_of(announced, sent, association) == 0xA900
        assert association.send_c_store(sendable(announced)).Status == 0x0000
    assert uid("another") not in shared.stored()


def send_under_the_name_of(announced: Dataset, sent: Dataset, association: Association) -> int:
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = announced.SOPClassUID, announced.SOPInstanceUID
    request.DataSet = BytesIO(encode(sent, is_implicit_vr=False, is_little_endian=True) or b"")
    association._reactor_checkpoint.clear()
    association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    _, answer = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    return int(answer.Status)


def test_a_data_set_that_cannot_be_parsed_is_refused_and_the_association_goes_on(shared: Running) -> None:
    good, bad = study(5, count=2)
    bad.StudyInstanceUID = ""
    assert store(shared, bad, good) == [0xC100, 0x0000]


def test_a_full_disk_is_temporary_and_says_so(tmp_path: Path) -> None:
    with listening(tmp_path / "var", disk_low_bytes=str(1 << 60)) as running:
        with associated(running.port) as association:
            [dataset] = study(6, count=1)
            answer = association.send_c_store(sendable(dataset))
            assert (answer.Status, answer.ErrorComment) == (0xA700, "disk is low")
        assert running.stored() == {}


def test_a_spool_that_cannot_be_written_is_temporary_and_nothing_is_noted(tmp_path: Path) -> None:
    with listening(tmp_path / "var") as running:
        unfinished = running.settings.spool_dir / "unfinished"
        unfinished.rename(unfinished.with_name("away"))
        [dataset] = study(13, count=1)
        assert store(running, dataset) == [0xA700]
        assert running.stored() == {}
        unfinished.with_name("away").rename(unfinished)
        assert store(running, dataset) == [0x0000]


def test_a_database_that_is_locked_is_temporary_and_echo_does_not_wait_for_it(tmp_path: Path) -> None:
    with listening(tmp_path / "var") as running:
        with closing(sqlite3.connect(tmp_path / "var" / "ledger.sqlite", isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            started = time.monotonic()
            with associated(running.port, [(VERIFICATION, ExplicitVRLittleEndian)]) as association:
                assert association.send_c_echo().Status == 0x0000
            assert time.monotonic() - started < 5
            database.execute("ROLLBACK")
        assert store(running, *study(7)) == [0x0000] * 3


def test_strangers_are_rejected_and_allowed_peers_are_not(tmp_path: Path) -> None:
    with listening(tmp_path / "var", allowed_calling_aes="MR1,MR2", ae_title="GADO") as running:
        with associated(running.port, calling="MR2", called="GADO") as association:
            assert association.is_established
        with associated(running.port, calling="STRANGER", called="GADO") as association:
            assert association.is_rejected
        with associated(running.port, calling="MR1", called="LOWGAD") as association:
            assert association.is_rejected


# --- bad peers --------------------------------------------------------------------------------------------------------


def answers_echo(port: int) -> bool:
    with associated(port, [(VERIFICATION, ExplicitVRLittleEndian)]) as association:
        return bool(association.is_established and association.send_c_echo().Status == 0x0000)


def is_closed(connection: socket.socket) -> bool:
    """Whether the peer has closed; what it said before is passed over."""
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


@contextmanager
def connected(port: int, says: bytes) -> Iterator[socket.socket]:
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        connection.settimeout(10)
        connection.sendall(says)
        yield connection


def test_a_peer_that_announces_four_gigabytes_is_cut_off_and_takes_no_memory(shared: Running) -> None:
    before = shared.memory_mib()
    announcement = struct.pack(">BBI", 0x01, 0, 0xFFFFFFFF)
    with connected(shared.port, announcement) as connection:
        try:
            for _ in range(64):
                connection.sendall(bytes(1 << 20))
        except ConnectionError:
            pass
        assert is_closed(connection)
    assert shared.memory_mib() - before < 20
    assert answers_echo(shared.port)


def test_a_peer_that_falls_silent_inside_a_message_is_cut_off_and_blocks_nobody(shared: Running) -> None:
    half = struct.pack(">BBI", 0x01, 0, 200) + bytes(20)
    with connected(shared.port, half) as silent:
        assert answers_echo(shared.port)
        assert is_closed(silent)


def test_peers_that_say_nothing_block_nobody(shared: Running) -> None:
    silent = [socket.create_connection(("127.0.0.1", shared.port)) for _ in range(20)]
    assert answers_echo(shared.port)
    assert store(shared, *study(8)) == [0x0000] * 3
    for connection in silent:
        connection.close()


def test_nonsense_is_cut_off(shared: Running) -> None:
    with connected(shared.port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert is_closed(connection)
    assert answers_echo(shared.port)


def test_more_connections_than_allowed_are_closed_and_the_others_live(tmp_path: Path) -> None:
    with listening(tmp_path / "var", max_associations="2") as running:
        opened = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(8)]
        wait_until(lambda: any(line["message"] == "connection closed: too many" for line in running.lines()))
        for connection in opened:
            connection.close()
        wait_until(lambda: answers_echo(running.port), what="an answer after the crowd has left")


def test_an_object_larger_than_allowed_is_cut_off(tmp_path: Path) -> None:
    with listening(tmp_path / "var", max_object_bytes=str(1 << 20)) as running:
        [dataset] = make_pair(slices=1, rows=1024, columns=1024).pre
        with associated(running.port) as association:
            association.send_c_store(sendable(dataset))
        assert running.stored() == {}
        assert answers_echo(running.port)


# --- the crash contract -----------------------------------------------------------------------------------------------


def test_killed_right_after_success_it_has_lost_nothing(tmp_path: Path) -> None:
    with listening(tmp_path / "var") as running:
        answered = set()
        with associated(running.port) as association:
            for dataset in study(9, count=12):
                assert association.send_c_store(sendable(dataset)).Status == 0x0000
                answered.add(str(dataset.SOPInstanceUID))
            running.kill()
        running.start()
        assert running.stored().keys() == answered
        with Ledger.open(running.settings.ledger_url) as ledger:
            assert len(ledger.received.of_study(uid(9, "study"))) == 12


def test_killed_at_any_moment_it_keeps_all_that_it_answered_for_and_takes_the_rest_again(tmp_path: Path) -> None:
    datasets = study(10, count=40)
    with listening(tmp_path / "var") as running:
        answered: list[str] = []
        with associated(running.port) as association:
            for index, dataset in enumerate(datasets):
                if index == 20:
                    assert running.process is not None
                    os.kill(running.process.pid, signal.SIGKILL)  # while the next ones are on their way
                try:
                    answer = association.send_c_store(sendable(dataset))
                except RuntimeError:  # the association is gone
                    break
                if getattr(answer, "Status", None) == 0x0000:
                    answered.append(str(dataset.SOPInstanceUID))
        running.close()
        running.start()
        assert set(answered) <= running.stored().keys()
        assert store(running, *datasets) == [0x0000] * 40
        assert len(running.stored()) == 40


def test_told_to_stop_it_lets_go_of_peers_that_do_nothing(tmp_path: Path) -> None:
    with listening(tmp_path / "var") as running, connected(running.port, b""), associated(running.port) as association:
        assert association.is_established
        assert running.process is not None
        running.process.terminate()
        assert running.process.wait(25) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly_when_told(tmp_path: Path, number: signal.Signals) -> None:
    with listening(tmp_path / "var") as running:
        assert running.process is not None
        running.process.send_signal(number)
        assert running.process.wait(20) == 0


def test_it_stops_when_the_supervisor_dies(tmp_path: Path) -> None:
    with listening(tmp_path / "var") as running:
        assert running.process is not None
        assert running.process.stdin is not None
        running.process.stdin.close()
        assert running.process.wait(20) == 0


def test_the_log_of_a_listener_names_no_patient_and_no_study(shared: Running) -> None:
    [dataset] = study(11, count=1)
    dataset.PatientName = "Secret^Name"
    bad = study(12, count=1)[0]
    del bad.StudyInstanceUID
    bad.add(DataElement("StudyInstanceUID", "UI", "not a uid", validation_mode=IGNORE))
    assert store(shared, dataset, bad) == [0x0000, 0xC100]
    text = shared.log.read_text()
    assert "object stored" in text
    for secret in ("Secret", "SYNTH", str(dataset.StudyInstanceUID), str(dataset.SOPInstanceUID), "not a uid"):
        assert secret not in text
