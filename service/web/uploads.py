"""What arrives over REST: a multipart body of DICOM files or zip archives, made safe before anything is believed.

Hides multipart parsing, archives and their attacks, and which files of an upload are DICOM at all. Every file is
written under a number in a folder of its own, never under a name that the sender chose. Must never decode pixels, never
unpack an archive inside an archive, and never leave anything behind: the caller's folder is all it writes to.
"""

from __future__ import annotations

import errno
import hashlib
import io
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.core.actor import REST
from service.core.dicom.accepted import HEAD_BYTES, SOP_CLASSES, may_be_image
from service.core.errors import Permanent, Reason
from service.core.job import Job, JobOptions
from service.core.ledger import Added, Ledger
from service.core.settings import Settings
from service.intake import Intake
from service.objects import from_file

CHUNK_BYTES = 1 << 20
MAX_FIELD_BYTES = 4096
MAX_FIELDS = 32
# Deflate reaches 1032:1. Slices of MR rarely pass 20:1, even where most of them is air.
MAX_COMPRESSION_RATIO = 200
HARMLESS_BYTES = 16 << 20  # the ratio is not judged below this
DIRECTORY_BYTES_PER_FILE = 512  # of a zip's central directory, which is read into memory as a whole
ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")


@dataclass(frozen=True)
class Received:
    """One file on disk. `name` is what the sender called it: only for judging what it is, never for a path."""

    path: Path
    name: str


@dataclass(frozen=True)
class Upload:
    """A whole multipart body: its files on disk and its form fields."""

    files: tuple[Received, ...]
    fields: dict[str, str]


class MultipartReceiver:
    """Writes a multipart/form-data body (RFC 7578) to a folder while it arrives.

    Args:
        content_type: value of the request's Content-Type.
        folder: an empty folder; files are numbered in it.
        settings: `max_upload_bytes` and `max_upload_files` are enforced as the bytes come.

    Raises:
        ValueError: the body is not multipart/form-data.
    """

    def __init__(self, content_type: str, folder: Path, settings: Settings) -> None:
        kind, parameters = parse_options_header(content_type)
        boundary = parameters.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise ValueError("the body must be multipart/form-data with a boundary")
        self._folder, self._settings = folder, settings
        self._bytes = 0
        self._part = _Part()
        self._header = (b"", b"")
        self._files: list[Received] = []
        self._fields: dict[str, str] = {}
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._open_part,
                "on_part_data": self._data,
                "on_part_end": self._end_part,
            },
        )

    def write(self, chunk: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            Permanent: UPLOAD_TOO_LARGE, STORAGE_FULL.
            ValueError: malformed multipart.
        """
        self._bytes += len(chunk)
        if self._bytes > self._settings.max_upload_bytes:
            raise Permanent(Reason.UPLOAD_TOO_LARGE, f"more than {self._settings.max_upload_bytes} bytes")
        try:
            with _named_when_full():
                self._parser.write(chunk)
        except FormParserError:
            raise ValueError("the multipart body is malformed") from None

    def finish(self) -> Upload:
        """The body has ended.

        Raises:
            ValueError: it ended too early.
        """
        try:
            self._parser.finalize()
        except FormParserError:
            raise ValueError("the multipart body ended too early") from None
        if self._part.is_open:
            raise ValueError("the multipart body ended too early")
        return Upload(tuple(self._files), self._fields)

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._part.file is not None:
            self._part.file.close()

    def _begin_part(self) -> None:
        self._part = _Part(is_open=True)

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0] + data[start:end], self._header[1])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0], self._header[1] + data[start:end])

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._part.disposition = value
        self._header = (b"", b"")

    def _open_part(self) -> None:
        _, options = parse_options_header(self._part.disposition)
        self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" not in options:
            return
        if len(self._files) >= self._settings.max_upload_files:
            raise Permanent(Reason.UPLOAD_TOO_LARGE, f"more than {self._settings.max_upload_files} files")
        name = options[b"filename"].decode("utf-8", "replace")
        received = Received(self._folder / f"{len(self._files):06}", name)
        self._files.append(received)
        self._part.file = received.path.open("xb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.file is not None:
            self._part.file.write(memoryview(data)[start:end])
            return
        self._part.value += data[start:end]
        if len(self._part.value) > MAX_FIELD_BYTES or len(self._fields) >= MAX_FIELDS:
            raise ValueError("a form field is too long, or there are too many")

    def _end_part(self) -> None:
        self._part.is_open = False
        if self._part.file is not None:
            self._part.file.close()
        else:
            self._fields[self._part.name] = self._part.value.decode("utf-8", "replace").strip()


@dataclass
class _Part:
    """The part of a multipart body that is being read."""

    is_open: bool = False
    disposition: bytes = b""
    name: str = ""
    value: bytes = b""
    file: IO[bytes] | None = None


def unpack(files: Iterable[Received], folder: Path, settings: Settings) -> list[Received]:
    """Replace every zip archive by the files in it. Archives inside archives stay as they are.

    Args:
        files: what was received.
        folder: an empty folder to unpack into.
        settings: `max_unpacked_bytes` and `max_upload_files` hold for all archives together.

    Raises:
        Permanent: ARCHIVE_UNREADABLE, ARCHIVE_TOO_LARGE or ARCHIVE_UNSAFE_PATH. Judged before a byte is unpacked, as
            far as the archive's directory tells the truth; where it lies, reading stops at the size it claims.
    """
    budget = _Budget(settings.max_upload_files, settings.max_unpacked_bytes)
    return [item for received in files for item in _expand(received, folder, budget)]


def accept(
    upload: Upload, folder: Path, options: JobOptions, *, settings: Settings, ledger: Ledger, intake: Intake
) -> tuple[Job, bool]:
    """Take a whole upload in and start its job, or refuse it and keep nothing of it.

    Returns:
        The job, and whether it is new.

    Raises:
        Permanent: the archive's reason; EMPTY_UPLOAD, UNREADABLE_FILE, UNSUPPORTED_OBJECT, TWO_PATIENTS, TWO_STUDIES,
            NOT_MR, INSTANCE_CONFLICT; STORAGE_FULL.
    """
    with _named_when_full():
        unpacked = folder / "unpacked"
        unpacked.mkdir()
        study_uid, paths = _examine(list(dicom_files(unpack(upload.files, unpacked, settings))), settings, ledger)
        for path in paths:
            if intake.admit(from_file(path.read_bytes()), REST) is Added.CONFLICT:
                raise Permanent(Reason.INSTANCE_CONFLICT)
    return intake.start(study_uid, options, REST)


def dicom_files(files: Iterable[Received]) -> Iterator[Received]:
    """Those that are, or claim to be, DICOM images; sidecars lie in most exports and are passed over."""
    for received in files:
        name = PurePosixPath(received.name.replace("\\", "/"))
        if may_be_image(name, _head(received.path, HEAD_BYTES)):
            yield received


@dataclass(frozen=True)
class _Seen:
    """What is left of an object once its header was looked at."""

    path: Path
    patient: str
    study_uid: str
    series_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    sha256: str


def _examine(files: Sequence[Received], settings: Settings, ledger: Ledger) -> tuple[str, list[Path]]:
    """The study's UID and its MR files; objects of other kinds are set aside, as in any export of a study.

    Every header is read before anything is stored, so that a refused upload leaves nothing.
    """
    if not files:
        raise Permanent(Reason.EMPTY_UPLOAD)
    seen = [_look_at(received.path, settings) for received in files]
    if (patients := len({item.patient for item in seen})) > 1:
        raise Permanent(Reason.TWO_PATIENTS, f"{patients} patients in {len(seen)} files")
    if (studies := len({item.study_uid for item in seen})) > 1:
        raise Permanent(Reason.TWO_STUDIES, f"{studies} studies in {len(seen)} files")
    images = [item for item in seen if item.sop_class_uid in SOP_CLASSES]
    if not images:
        raise Permanent(Reason.NOT_MR, f"{len(seen)} files")
    if conflicts := ledger.received.conflicts(images):
        raise Permanent(Reason.INSTANCE_CONFLICT, f"{conflicts} of {len(images)} images")
    return images[0].study_uid, [item.path for item in images]


def _look_at(path: Path, settings: Settings) -> _Seen:
    if path.stat().st_size > settings.max_object_bytes:
        raise Permanent(Reason.UNSUPPORTED_OBJECT, f"an object of more than {settings.max_object_bytes} bytes")
    found = from_file(path.read_bytes())
    digest = hashlib.sha256(found.chunks[0])
    digest.update(found.chunks[1])
    return _Seen(
        path=path,
        patient=found.patient,
        study_uid=found.study_uid,
        series_uid=found.series_uid,
        sop_class_uid=found.sop_class_uid,
        sop_instance_uid=found.sop_instance_uid,
        transfer_syntax_uid=found.transfer_syntax_uid,
        sha256=digest.hexdigest(),
    )


@dataclass
class _Budget:
    """How much may still be unpacked."""

    files: int
    bytes: int
    unpacked: int = field(default=0)

    def spend(self, members: list[zipfile.ZipInfo], archive_bytes: int) -> None:
        """Charge an archive by what its directory claims."""
        size = sum(member.file_size for member in members)
        self.files, self.bytes = self.files - len(members), self.bytes - size
        if self.files < 0 or self.bytes < 0:
            raise Permanent(Reason.ARCHIVE_TOO_LARGE, f"{len(members)} files, {size} bytes")
        if size > HARMLESS_BYTES and size > MAX_COMPRESSION_RATIO * archive_bytes:
            raise Permanent(Reason.ARCHIVE_TOO_LARGE, f"expands {size // max(archive_bytes, 1)} times")


class _BoundedReader(io.BufferedReader):
    """An archive that is neither read in large pieces (`zipfile` reads the directory in one) nor outside its bounds."""

    def __init__(self, path: Path, longest: int) -> None:
        super().__init__(path.open("rb", buffering=0))
        self._longest, self._size = longest, path.stat().st_size

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if whence == io.SEEK_SET and not 0 <= offset <= self._size:
            raise zipfile.BadZipFile("an offset outside the archive")
        return super().seek(offset, whence)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self._longest:
            raise Permanent(Reason.ARCHIVE_TOO_LARGE, f"a directory of {size} bytes")
        return super().read(size)


def _expand(received: Received, folder: Path, budget: _Budget) -> Iterator[Received]:
    """The files of an archive; the file itself if it is none."""
    if _head(received.path, 4) not in ZIP_MAGICS:
        yield received
        return
    longest = CHUNK_BYTES + DIRECTORY_BYTES_PER_FILE * max(budget.files, 0)
    try:
        with _BoundedReader(received.path, longest) as stream, zipfile.ZipFile(stream) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in archive.infolist():
                _check_member(member)
            budget.spend(members, received.path.stat().st_size)
            for member in members:
                budget.unpacked += 1
                yield _extract(archive, member, folder / f"{budget.unpacked:06}")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OverflowError, NotImplementedError) as error:
        raise Permanent(Reason.ARCHIVE_UNREADABLE, type(error).__name__) from None
    finally:
        received.path.unlink(missing_ok=True)


def _check_member(member: zipfile.ZipInfo) -> None:
    """Refuse what no honest export of a study contains."""
    name = member.orig_filename.replace("\\", "/")
    path, mode = PurePosixPath(name), member.external_attr >> 16
    has_drive = len(name) > 1 and name[1] == ":"
    if path.is_absolute() or has_drive or ".." in path.parts or "\0" in name:
        raise Permanent(Reason.ARCHIVE_UNSAFE_PATH, "a path outside the archive")
    if stat.S_IFMT(mode) not in {0, stat.S_IFREG, stat.S_IFDIR}:
        raise Permanent(Reason.ARCHIVE_UNSAFE_PATH, "a link or special file")
    if member.flag_bits & 0x1:
        raise Permanent(Reason.ARCHIVE_UNREADABLE, "encrypted")
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:  # LZMA takes memory as it is told to
        raise Permanent(Reason.ARCHIVE_UNREADABLE, f"compression method {member.compress_type}")


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> Received:
    with archive.open(member) as source, target.open("xb") as sink:
        while chunk := source.read(CHUNK_BYTES):
            sink.write(chunk)
    return Received(target, member.filename)


@contextmanager
def _named_when_full() -> Iterator[None]:
    """A full disk has a reason of its own."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise Permanent(Reason.STORAGE_FULL, "the disk is full") from None
        raise


def _head(path: Path, count: int) -> bytes:
    with path.open("rb") as stream:
        return stream.read(count)
