"""Sending derived instances to a PACS: C-STORE as SCU (PS3.4 Annex B, PS3.7 section 9.1.1).

Hides association negotiation, which presentation contexts the files need, and what the many ways of failing mean:
which instance is stored, which one the destination will never take, and which one is worth another attempt. Must never
call an instance sent before the destination answered for it, never change an instance beyond re-encoding it between
uncompressed transfer syntaxes, and never log identifiers of patients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, ImplicitVRLittleEndian
from pynetdicom.association import Association

from service.core.association import associated
from service.core.dicom.status import (
    ANY_OUT_OF_RESOURCES,
    DUPLICATE_SOP_INSTANCE,
    PROCESSING_FAILURE,
    RESOURCE_LIMITATION,
    STORE_TEXT,
    SUCCESS,
    WARNINGS,
    in_words,
)
from service.core.errors import Reason, Retryable
from service.core.settings import Destination


class Verdict(Enum):
    """What an answer means for one instance."""

    SENT = "sent"
    SENT_WITH_WARNING = "sent with warning"
    REFUSED = "refused"  # will be refused again until somebody changes the destination
    BUSY = "busy"  # worth another attempt


@dataclass(frozen=True)
class Answer:
    """What the destination said about one file. `status` is the DIMSE status, None where none was exchanged."""

    path: Path
    verdict: Verdict
    status: int | None
    text: str

    @property
    def is_sent(self) -> bool:
        """True if the destination holds the instance."""
        return self.verdict in {Verdict.SENT, Verdict.SENT_WITH_WARNING}


def syntaxes_of(paths: Iterable[Path]) -> dict[Path, tuple[str, str] | None]:
    """(SOP class UID, transfer syntax UID) of each file, None for one that has gone or is not DICOM.

    One look at each header, before anything is sent and for all destinations together.
    """
    return {path: _syntax_of(path) for path in paths}


def send(syntaxes: Mapping[Path, tuple[str, str] | None], destination: Destination) -> Iterator[Answer]:
    """Send DICOM files over one association and yield each answer as it comes, so that it can be recorded at once.

    Files whose presentation context was not accepted are answered REFUSED while the others are still sent. A file that
    has gone or is not DICOM is answered REFUSED too.

    Args:
        syntaxes: what `syntaxes_of` says of the files.
        destination: whom to call.

    Raises:
        Retryable: DESTINATION_UNREACHABLE, before or between answers; what was yielded stays true.
        Permanent: DESTINATION_REFUSED, the association was rejected for good or no presentation context was accepted.
    """
    for path in [path for path, syntax in syntaxes.items() if syntax is None]:
        yield Answer(path, Verdict.REFUSED, None, "the file is missing or not DICOM")
    readable = {path: syntax for path, syntax in syntaxes.items() if syntax is not None}
    if not readable:
        return
    offers = [(sop_class, [syntax]) for sop_class, syntax in offers_for(sorted(set(readable.values())))]
    with associated(destination, offers, calling_ae_title=destination.calling_ae_title) as association:
        for number, path in enumerate(readable):
            yield _store(association, path, number % 0xFFFF + 1)


def _syntax_of(path: Path) -> tuple[str, str] | None:
    try:
        header = dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID"])
        return str(header.SOPClassUID), str(header.file_meta.TransferSyntaxUID)
    except (OSError, InvalidDicomError, AttributeError):
        return None


def offers_for(syntaxes: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The files' own pairs, one context each so that acceptance is exact, and Implicit VR LE where we can re-encode.

    PS3.5 section 10.1: every application entity must understand Implicit VR Little Endian.
    """
    offered = list(syntaxes)
    for sop_class, syntax in syntaxes:
        fallback = (sop_class, str(ImplicitVRLittleEndian))
        if not UID(syntax).is_compressed and fallback not in offered:
            offered.append(fallback)
    return offered


def _store(association: Association, path: Path, message_id: int) -> Answer:
    """Send one file.

    Raises:
        Retryable: DESTINATION_UNREACHABLE, the association broke or the answer did not come in time.
    """
    if not association.is_established:
        raise Retryable(Reason.DESTINATION_UNREACHABLE, "the association was lost")
    try:
        dataset = dcmread(path)
    except (OSError, InvalidDicomError):
        return Answer(path, Verdict.REFUSED, None, "the file is missing or not DICOM")
    try:
        response = association.send_c_store(dataset, msg_id=message_id)
    except ValueError:  # pynetdicom: no accepted context for this class and transfer syntax, or it cannot be encoded
        return Answer(path, Verdict.REFUSED, None, "the destination accepts no suitable presentation context")
    except RuntimeError as error:  # pynetdicom: the association ended since we looked
        raise Retryable(Reason.DESTINATION_UNREACHABLE, "the association was lost") from error
    return _read_answer(path, response)


def _read_answer(path: Path, response: Dataset) -> Answer:
    """The meaning of a C-STORE-RSP (PS3.4 table B.2-1)."""
    if "Status" not in response:
        raise Retryable(Reason.DESTINATION_UNREACHABLE, "the association broke before the answer, or none came in time")
    status = int(response.Status)
    return Answer(path, verdict_of(status), status, in_words(status, STORE_TEXT))


def verdict_of(status: int) -> Verdict:
    """What a status means.

    0x0111 counts as sent: our UIDs are a digest of sources, model and settings, so the same UID is the same image, and
    it is what a strict archive answers when its first answer was lost on the way.
    """
    if status == SUCCESS:
        return Verdict.SENT
    if status in WARNINGS or status == DUPLICATE_SOP_INSTANCE:
        return Verdict.SENT_WITH_WARNING
    if status in ANY_OUT_OF_RESOURCES or status in {PROCESSING_FAILURE, RESOURCE_LIMITATION}:
        return Verdict.BUSY
    return Verdict.REFUSED
