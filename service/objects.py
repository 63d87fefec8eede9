"""A received DICOM object: its encoded bytes, its identifiers, and a summary of its header.

Hides parsing of bytes that nobody vouches for, and gives every object the same file head (PS3.10 section 7.1: an empty
preamble, and file meta information that depends on nothing but the object), so that the same data set has the same
digest however it arrived. Must never decode pixels, change a byte of the data set, or put a value into an error.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from io import BytesIO

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_file_meta_info
from pydicom.tag import BaseTag
from pydicom.uid import UID

from service.core.dicom.accepted import DAMAGE, TRANSFER_SYNTAXES
from service.core.dicom.series import HeaderSummary
from service.core.dicom.site_rules import names_of
from service.core.errors import Permanent, Reason

PREAMBLE = b"\0" * 128 + b"DICM"
IMPLEMENTATION_CLASS_UID = UID("2.25.248861340379103211946264364152217420033")  # of the file heads that we write
_FILE_META, _PIXELS = 0x0002, 0x7FE0  # groups of elements
_UID = re.compile(r"[0-9.]{1,64}")  # lenient: leading zeros are common, and UIDs are never used in paths


@dataclass(frozen=True)
class DicomObject:
    """One object as it will be stored."""

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    transfer_syntax_uid: str
    patient: str  # stands for the patient, to tell two apart in one upload; never stored
    names: dict[str, str]  # what the site's protocols are compared with; never stored
    summary: HeaderSummary
    chunks: tuple[bytes, bytes]  # file head and data set


def from_wire(dataset: bytes, transfer_syntax_uid: str) -> DicomObject:
    """An object from the bytes of a C-STORE request.

    Raises:
        Permanent: UNREADABLE_FILE; UNSUPPORTED_OBJECT for a transfer syntax that we do not take.
    """
    if transfer_syntax_uid not in TRANSFER_SYNTAXES:
        raise Permanent(Reason.UNSUPPORTED_OBJECT, "transfer syntax")
    try:
        return _object(dataset, UID(transfer_syntax_uid))
    except DAMAGE as error:
        raise Permanent(Reason.UNREADABLE_FILE, f"the header cannot be parsed ({type(error).__name__})") from None


def from_file(data: bytes) -> DicomObject:
    """An object from a DICOM file, whose own preamble and file meta information are left behind.

    Raises:
        Permanent: UNREADABLE_FILE; UNSUPPORTED_OBJECT for a transfer syntax that we do not take.
    """
    if data[128:132] != b"DICM":
        raise Permanent(Reason.UNREADABLE_FILE, "a file without the DICM prefix")
    try:
        stream = BytesIO(data)
        stream.seek(132)
        meta = read_dataset(stream, False, True, stop_when=lambda tag, *_: tag.group != _FILE_META)
        transfer_syntax_uid = str(meta.TransferSyntaxUID)
    except DAMAGE as error:
        raise Permanent(Reason.UNREADABLE_FILE, f"the file head cannot be parsed ({type(error).__name__})") from None
    return from_wire(data[stream.tell() :], transfer_syntax_uid)


def _object(dataset: bytes, transfer_syntax: UID) -> DicomObject:
    header = read_dataset(BytesIO(dataset), transfer_syntax.is_implicit_VR, True, stop_when=_at_pixels)
    sop_class, sop_instance = _uid(header, "SOPClassUID"), _uid(header, "SOPInstanceUID")
    return DicomObject(
        sop_class_uid=sop_class,
        sop_instance_uid=sop_instance,
        study_uid=_uid(header, "StudyInstanceUID"),
        series_uid=_uid(header, "SeriesInstanceUID"),
        transfer_syntax_uid=str(transfer_syntax),
        patient=_patient(header),
        names=names_of(header),
        summary=HeaderSummary.of(header),
        chunks=(_file_head(sop_class, sop_instance, transfer_syntax), dataset),
    )


def _at_pixels(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag.group >= _PIXELS


def _uid(header: Dataset, keyword: str) -> str:
    value = str(header.get(keyword) or "")
    if not _UID.fullmatch(value):
        raise Permanent(Reason.UNREADABLE_FILE, f"{keyword} is missing or not a UID")
    return value


def _patient(header: Dataset) -> str:
    values = [_letters(header, keyword) for keyword in ("IssuerOfPatientID", "PatientID")]
    if not values[1]:
        values = [_letters(header, keyword) for keyword in ("PatientName", "PatientBirthDate")]
    return hashlib.sha256(b"\0".join(values)).hexdigest()


def _letters(header: Dataset, keyword: str) -> bytes:
    """Text in UTF-8, in whatever character set it came; the bytes that came where they are not in the stated one."""
    element = header.get_item(keyword)
    text = str(header.get(keyword) or "").strip()
    is_whole = "\N{REPLACEMENT CHARACTER}" not in text
    return text.encode(errors="replace") if is_whole or element is None else bytes(element.value or b"").strip()


def _file_head(sop_class_uid: str, sop_instance_uid: str, transfer_syntax: UID) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sop_class_uid)
    meta.MediaStorageSOPInstanceUID = UID(sop_instance_uid)
    meta.TransferSyntaxUID = transfer_syntax
    meta.ImplementationClassUID = IMPLEMENTATION_CLASS_UID
    meta.ImplementationVersionName = "LOWGAD"
    stream = DicomBytesIO()
    stream.write(PREAMBLE)
    write_file_meta_info(stream, meta)
    return stream.getvalue()
