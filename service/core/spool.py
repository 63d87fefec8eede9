"""The spool: received bytes and finished results on the local file system, durable when a call returns.

Hides how a file becomes durable (temporary name, fsync, rename, fsync of the folder) and where it lies. Objects are
named by the SHA-256 of their content, results by the id of their job: nothing that a sender chose is ever part of a
path. Must never look into the bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

PRIVATE_FOLDER = 0o700
_SHA256 = re.compile(r"[0-9a-f]{64}")
_JOB_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class StoredFile:
    """Where bytes were put."""

    path: Path
    sha256: str
    size: int  # bytes


class Spool:
    """A spool folder. Threads and processes may share it.

    Args:
        root: the folder; made when absent, readable by its owner only.
        low_bytes: free disk space below which `is_low` is true.
    """

    def __init__(self, root: Path, low_bytes: int = 0) -> None:
        self._objects, self._results, self._unfinished = root / "objects", root / "results", root / "unfinished"
        self._root, self._low_bytes = root, low_bytes
        for folder in (self._objects, self._results, self._unfinished):
            folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)

    def free_bytes(self) -> int:
        """Free space of the disk, in bytes."""
        return shutil.disk_usage(self._root).free

    def is_low(self) -> bool:
        """Whether nothing more should be accepted."""
        return self.free_bytes() < self._low_bytes

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder for work in progress on the spool's disk; gone afterwards, whatever happened."""
        folder = self._unfinished / uuid4().hex
        folder.mkdir(mode=PRIVATE_FOLDER)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- received objects ---------------------------------------------------------------------------------------------

    def put(self, data: bytes | Iterable[bytes]) -> StoredFile:
        """Store bytes, once per content.

        Raises:
            OSError: the disk is full or broken; nothing was stored.
        """
        unfinished = self._unfinished / uuid4().hex
        try:
            sha256, size = _write(unfinished, [data] if isinstance(data, bytes) else data)
            target = self.path(sha256)
            if not target.parent.is_dir():
                target.parent.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
                _sync(self._objects)
            unfinished.replace(target)
            _sync(target.parent)
        finally:
            unfinished.unlink(missing_ok=True)
        return StoredFile(target, sha256, size)

    def path(self, sha256: str) -> Path:
        """Where the object with this digest lies, or would lie.

        Raises:
            ValueError: not a SHA-256 in lower-case hexadecimal.
        """
        if not _SHA256.fullmatch(sha256):
            raise ValueError("not a SHA-256")
        return self._objects / sha256[:2] / f"{sha256}.dcm"

    def is_whole(self, sha256: str) -> bool:
        """Whether the object with this digest is there and still has it: all of it is read.

        Raises:
            OSError: the disk does not answer.
        """
        try:
            with self.path(sha256).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except FileNotFoundError:
            return False

    def remove(self, sha256: str) -> None:
        """Delete an object, if it is there."""
        self.path(sha256).unlink(missing_ok=True)

    # --- results ------------------------------------------------------------------------------------------------------

    def result_dir(self, job_id: str) -> Path:
        """The published result of a job: a folder of *.dcm for each kind, and `report.json`. May not exist (yet).

        Raises:
            ValueError: not the id of a job.
        """
        if not _JOB_ID.fullmatch(job_id):
            raise ValueError("not the id of a job")
        return self._results / job_id

    @contextmanager
    def publish(self, job_id: str) -> Iterator[Path]:
        """An empty folder to write a result into; it becomes `result_dir(job_id)` as a whole, or not at all."""
        target = self.result_dir(job_id)
        with self.workspace() as unfinished:
            yield unfinished
            for path in [*unfinished.rglob("*"), unfinished]:
                _sync(path)
            replaced = self._unfinished / uuid4().hex
            if target.exists():
                target.rename(replaced)
            unfinished.rename(target)
            _sync(self._results)
        shutil.rmtree(replaced, ignore_errors=True)

    def remove_result(self, job_id: str) -> None:
        """Delete a result, if it is there."""
        shutil.rmtree(self.result_dir(job_id), ignore_errors=True)

    # --- the janitor --------------------------------------------------------------------------------------------------

    def sweep_up(
        self,
        is_known: Callable[[str], bool],
        is_job: Callable[[str], bool],
        *,
        unfinished_seconds: float,
        kept_seconds: float,
    ) -> int:
        """Delete what a crash left behind and what the ledger has forgotten.

        Args:
            is_known: whether the object with this digest must stay.
            is_job: whether the result of the job with this id must stay.
            unfinished_seconds: younger unfinished work may belong to somebody at work.
            kept_seconds: younger objects and results stay even when the ledger does not know them, since it may be the
                wrong ledger: a new database, or one that was restored from a backup.

        Returns:
            How many files and folders were deleted.
        """
        candidates: list[tuple[Path, float, Callable[[str], bool]]] = [
            *((path, unfinished_seconds, lambda _: False) for path in self._unfinished.iterdir()),
            *((path, kept_seconds, is_job) for path in self._results.iterdir()),
            *((path, kept_seconds, is_known) for path in self._objects.glob("*/*.dcm")),
        ]
        deleted = 0
        for path, seconds, must_stay in candidates:
            limit = time.time() - seconds
            # The age is asked for again at the end: an object that has arrived once more meanwhile is young again.
            if _modified(path) < limit and not must_stay(path.stem) and _modified(path) < limit:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                deleted += 1
        return deleted


def _write(path: Path, chunks: Iterable[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        os.fchmod(file.fileno(), 0o600)
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:  # an unbuffered write may take only a part
                rest = rest[file.write(rest) :]
            digest.update(chunk)
            size += len(chunk)
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # somebody finished it meanwhile
        return float("inf")
