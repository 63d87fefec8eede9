from __future__ import annotations

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.spool import Spool

JOB = "0123456789abcdef" * 2


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def files(spool: Spool, tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]


def age(path: Path, seconds: float) -> None:
    moment = path.stat().st_mtime - seconds
    os.utime(path, (moment, moment))


def test_bytes_come_back_under_their_digest(spool: Spool) -> None:
    stored = spool.put(b"image")
    assert (stored.sha256, stored.size) == (hashlib.sha256(b"image").hexdigest(), 5)
    assert spool.path(stored.sha256) == stored.path
    assert stored.path.read_bytes() == b"image"


def test_chunks_are_stored_as_one_file(spool: Spool) -> None:
    assert spool.put([b"im", b"", b"age"]) == spool.put(b"image")


def test_the_same_bytes_are_kept_once_whoever_brings_them(spool: Spool, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(spool.put, [b"image"] * 16))
    assert len(set(stored)) == 1
    assert files(spool, tmp_path) == [stored[0].path]


def test_patient_data_is_readable_by_its_owner_only(spool: Spool, tmp_path: Path) -> None:
    stored = spool.put(b"image")
    with spool.publish(JOB) as folder:
        (folder / "report.json").write_text("{}")
    assert stat.S_IMODE(stored.path.stat().st_mode) == 0o600
    folders = [path for path in (tmp_path / "spool").rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


def test_a_sender_that_fails_half_way_leaves_nothing(spool: Spool, tmp_path: Path) -> None:
    def chunks():  # type: ignore[no-untyped-def]
        yield b"half"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        spool.put(chunks())
    assert files(spool, tmp_path) == []


@given(st.text(alphabet="./\\abc0\0", max_size=70))
def test_no_name_from_outside_reaches_a_path(name: str) -> None:
    spool = Spool.__new__(Spool)
    with pytest.raises(ValueError, match="not"):
        spool.path(name)
    with pytest.raises(ValueError, match="not"):
        spool.result_dir(name)


def test_a_result_appears_as_a_whole_and_replaces_the_one_before(spool: Spool) -> None:
    for version in ("1", "2"):
        with spool.publish(JOB) as folder:
            (folder / "sd").mkdir()
            (folder / "sd" / f"{version}.dcm").write_text(version)
            assert not (spool.result_dir(JOB) / "sd" / f"{version}.dcm").exists()
        assert [path.name for path in (spool.result_dir(JOB) / "sd").iterdir()] == [f"{version}.dcm"]


def test_a_result_that_was_not_finished_changes_nothing(spool: Spool, tmp_path: Path) -> None:
    with spool.publish(JOB) as folder:
        (folder / "report.json").write_text("good")
    with pytest.raises(FileNotFoundError), spool.publish(JOB) as folder:
        (folder / "absent" / "report.json").write_text("half")
    assert [path.read_text() for path in files(spool, tmp_path)] == ["good"]


def test_the_janitor_takes_leftovers_and_orphans_and_nothing_else(spool: Spool, tmp_path: Path) -> None:
    wanted, orphan, young = spool.put(b"wanted"), spool.put(b"orphan"), spool.put(b"young")
    with spool.publish(JOB):
        pass
    age(spool.result_dir(JOB), 7200)
    half = tmp_path / "spool" / "unfinished" / "half"
    half.write_bytes(b"half")
    for path in (wanted.path, orphan.path, half):
        age(path, 7200)
    known = {wanted.sha256}
    ages = {"unfinished_seconds": 3600.0, "kept_seconds": 3600.0}
    assert spool.sweep_up(known.__contains__, lambda _: True, **ages) == 2
    assert spool.result_dir(JOB).is_dir()
    assert spool.sweep_up(known.__contains__, lambda _: False, **ages) == 1
    assert not spool.result_dir(JOB).exists()
    assert sorted(files(spool, tmp_path)) == sorted([wanted.path, young.path])


def test_a_ledger_that_knows_nothing_does_not_empty_the_spool(spool: Spool, tmp_path: Path) -> None:
    with spool.publish(JOB) as folder:
        (folder / "report.json").write_text("{}")
    for path in (spool.put(b"object").path, spool.result_dir(JOB)):
        age(path, 7200)
    before = files(spool, tmp_path)
    assert spool.sweep_up(lambda _: False, lambda _: False, unfinished_seconds=3600, kept_seconds=86400) == 0
    assert files(spool, tmp_path) == before


def test_an_object_that_arrives_again_while_the_janitor_asks_stays(spool: Spool) -> None:
    stored = spool.put(b"object")
    age(stored.path, 7200)

    def ask(_: str) -> bool:
        spool.put(b"object")
        return False

    assert spool.sweep_up(ask, ask, unfinished_seconds=3600, kept_seconds=3600) == 0
    assert stored.path.is_file()


def test_the_disk_is_low_below_the_watermark(tmp_path: Path) -> None:
    free = Spool(tmp_path).free_bytes()
    assert not Spool(tmp_path, low_bytes=free // 2).is_low()
    assert Spool(tmp_path, low_bytes=free * 2).is_low()
