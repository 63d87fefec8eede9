"""Zip archives that mean harm, are damaged, or are just large."""

from __future__ import annotations

import io
import random
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from service.core.errors import Permanent, Reason
from service.core.settings import Settings
from service.web.uploads import Received, dicom_files, unpack

DICOM = bytes(128) + b"DICM" + bytes(64)


def received(folder: Path, content: bytes, name: str = "upload.zip") -> Received:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{len(list(folder.iterdir())):06}"
    path.write_bytes(content)
    return Received(path, name)


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as writer:
        for name, content in members.items():
            writer.writestr(name, content)
    return stream.getvalue()


def unpacked(tmp_path: Path, content: bytes, **limits: int) -> list[Received]:
    target = tmp_path / "unpacked"
    target.mkdir()
    return unpack([received(tmp_path / "received", content)], target, Settings(data_dir=tmp_path, **limits))


def refusal(tmp_path: Path, content: bytes, **limits: int) -> Permanent:
    with pytest.raises(Permanent) as caught:
        unpacked(tmp_path, content, **limits)
    assert not any(path.is_file() for path in (tmp_path / "unpacked").iterdir()), "something was unpacked"
    return caught.value


def test_the_files_of_an_archive_are_unpacked_under_numbers_of_our_own(tmp_path: Path) -> None:
    files = unpacked(tmp_path, archive({"study/a/1.dcm": DICOM, "study/b/1.dcm": DICOM + b"2"}))
    assert [item.name for item in files] == ["study/a/1.dcm", "study/b/1.dcm"]
    assert [item.path.name for item in files] == ["000001", "000002"]
    assert [item.path.read_bytes() for item in files] == [DICOM, DICOM + b"2"]


def test_the_archive_itself_is_gone_once_it_is_unpacked(tmp_path: Path) -> None:
    unpacked(tmp_path, archive({"1.dcm": DICOM}))
    assert list((tmp_path / "received").iterdir()) == []


def test_a_file_that_is_no_archive_is_left_alone(tmp_path: Path) -> None:
    item = received(tmp_path / "received", DICOM, "1.dcm")
    assert unpack([item], tmp_path, Settings(data_dir=tmp_path)) == [item]


@pytest.mark.parametrize(
    "name", ["../evil.dcm", "a/../../evil.dcm", "/etc/evil.dcm", "..\\evil.dcm", "C:\\evil.dcm", "\\\\host\\evil.dcm"]
)
def test_a_path_outside_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    content = archive({"good.dcm": DICOM, name: DICOM})
    assert refusal(tmp_path, content).reason is Reason.ARCHIVE_UNSAFE_PATH


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK])
def test_a_link_or_device_is_refused(tmp_path: Path, kind: int) -> None:
    member = zipfile.ZipInfo("link.dcm")
    member.external_attr = (kind | 0o777) << 16
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as writer:
        writer.writestr(member, "/etc/passwd")
    assert refusal(tmp_path, stream.getvalue()).reason is Reason.ARCHIVE_UNSAFE_PATH


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    content = bytearray(archive({"1.dcm": DICOM}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    assert refusal(tmp_path, bytes(content)).detail == "encrypted"


def test_a_compression_that_can_demand_memory_is_refused(tmp_path: Path) -> None:
    content = archive({"1.dcm": DICOM}, zipfile.ZIP_LZMA)
    assert refusal(tmp_path, content).reason is Reason.ARCHIVE_UNREADABLE


def test_more_files_than_allowed_are_refused(tmp_path: Path) -> None:
    content = archive({f"{number}.dcm": b"" for number in range(6)})
    assert refusal(tmp_path, content, max_upload_files=5).reason is Reason.ARCHIVE_TOO_LARGE


def test_more_bytes_than_allowed_are_refused_before_unpacking(tmp_path: Path) -> None:
    content = archive({"1.dcm": bytes(2000)})
    assert refusal(tmp_path, content, max_unpacked_bytes=1999).reason is Reason.ARCHIVE_TOO_LARGE


def test_the_limits_hold_for_several_archives_together(tmp_path: Path) -> None:
    target = tmp_path / "unpacked"
    target.mkdir()
    files = [received(tmp_path / "received", archive({"1.dcm": bytes(1500)})) for _ in range(2)]
    with pytest.raises(Permanent) as caught:
        unpack(files, target, Settings(data_dir=tmp_path, max_unpacked_bytes=2000))
    assert caught.value.reason is Reason.ARCHIVE_TOO_LARGE


def test_a_bomb_is_refused_by_its_compression_ratio(tmp_path: Path) -> None:
    content = archive({"1.dcm": bytes(32 << 20)})
    assert refusal(tmp_path, content).detail.startswith("expands")


def test_a_small_archive_of_air_is_not_taken_for_a_bomb(tmp_path: Path) -> None:
    assert len(unpacked(tmp_path, archive({"1.dcm": bytes(1 << 20)}))) == 1


def test_a_member_that_lies_about_its_size_gives_no_more_than_it_claims(tmp_path: Path) -> None:
    content = bytearray(archive({"1.dcm": bytes(100_000)}))
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 24, 1000)
    with pytest.raises(Permanent) as caught:
        unpacked(tmp_path, bytes(content))
    assert caught.value.reason is Reason.ARCHIVE_UNREADABLE
    assert sum(path.stat().st_size for path in (tmp_path / "unpacked").iterdir()) <= 1000


def test_an_archive_with_a_huge_directory_takes_no_memory(tmp_path: Path) -> None:
    stream = io.BytesIO()
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0x21, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    directory = (entry + b"a") * 400_000
    stream.write(b"PK\x03\x04" + directory)
    stream.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), 4, 0))
    content = stream.getvalue()
    target = tmp_path / "unpacked"
    target.mkdir()
    item = received(tmp_path / "received", content)
    tracemalloc.start()
    try:
        with pytest.raises(Permanent) as caught:
            unpack([item], target, Settings(data_dir=tmp_path))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.reason is Reason.ARCHIVE_TOO_LARGE
    assert peak_bytes < 16 << 20


def test_an_archive_inside_an_archive_is_not_followed(tmp_path: Path) -> None:
    files = unpacked(tmp_path, archive({"inner.zip": archive({"1.dcm": DICOM}), "readme.txt": b"hello"}))
    assert [item.name for item in files] == ["inner.zip", "readme.txt"]
    assert list(dicom_files(files)) == []


def test_every_way_of_damaging_an_archive_has_a_named_reason(tmp_path: Path) -> None:
    good, rng = archive({f"{number}.dcm": bytes(rng_bytes(number)) for number in range(3)}), random.Random(5)
    reasons = set()
    for number in range(200):
        content = bytearray(good[: rng.randrange(4, len(good))] if number % 3 == 0 else good)
        for _ in range(rng.randrange(1, 8)):
            content[rng.randrange(4, len(content))] = rng.randrange(256)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            unpacked(folder, bytes(content))
        except Permanent as error:
            reasons.add(error.reason)
    assert Reason.ARCHIVE_UNREADABLE in reasons
    assert reasons <= {Reason.ARCHIVE_UNREADABLE, Reason.ARCHIVE_TOO_LARGE, Reason.ARCHIVE_UNSAFE_PATH}


def rng_bytes(seed: int) -> bytes:
    return random.Random(seed).randbytes(300)


def test_sidecars_are_passed_over_and_lost_slices_are_not(tmp_path: Path) -> None:
    names = {
        "IM0001": b"",
        "a.dcm": b"cut",
        "DICOM/I10": DICOM,
        "odd.bin": DICOM,
        "DICOMDIR": DICOM,
        "._a.dcm": b"x",
        "__MACOSX/a.dcm": b"x",
        "notes.txt": b"x",
        "report.json": b"{}",
        "export/LICENSE": b"terms",
        "1.2.840.113619.7": b"cut",
    }
    files = [received(tmp_path, content, name) for name, content in names.items()]
    assert [item.name for item in dicom_files(files)] == ["IM0001", "a.dcm", "DICOM/I10", "odd.bin", "1.2.840.113619.7"]
