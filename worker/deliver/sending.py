"""Sending derived instances to a PACS: C-STORE as SCU (PS3.4 Annex B, PS3.7 section 9.1.1).

Hides association negotiation, which presentation contexts the files need, and what the many ways of failing mean:
which instance is stored, which one the destination will never take, and which one is worth another attempt. Must never
call an instance sent before the destination answered for it, never change an instance beyond re-encoding it between
uncompressed transfer syntaxes, and never log identifiers of patients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, ImplicitVRLittleEndian
from pynetdicom import AE, _config
from pynetdicom.association import Association
from pynetdicom.events import EventHandlerType
from pynetdicom.presentation import build_context

from service.core.errors import Permanent, Reason, Retryable
from service.core.settings import Destination

_config.LOG_HANDLER_LEVEL = "none"  # the default handlers would write identifiers of patients to the log

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0  # a busy archive may take long to answer one C-STORE-RQ
PDU_BYTES = 131_072

# PS3.7 table C.5-1 and PS3.4 table B.2-1
SUCCESS = 0x0000
DUPLICATE_SOP_INSTANCE = 0x0111
PROCESSING_FAILURE = 0x0110
RESOURCE_LIMITATION = 0x0213
OUT_OF_RESOURCES = range(0xA700, 0xA800)
WARNINGS = range(0xB000, 0xC000)
STATUS_TEXT = {
    0xB000: "stored; the destination coerced data elements",
    0xB006: "stored; the destination discarded data elements",
    0xB007: "stored; the data set does not match its SOP class",
    DUPLICATE_SOP_INSTANCE: "the destination already holds this instance",
    PROCESSING_FAILURE: "processing failure",
    0x0117: "invalid SOP instance",
    0x0122: "SOP class not supported",
    0x0124: "not authorised",
    RESOURCE_LIMITATION: "resource limitation",
}
REJECTED_TRANSIENT = 2  # PS3.8 section 9.3.4, Result


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
    with associated(offers_for(sorted(set(readable.values()))), destination) as association:
        for number, path in enumerate(readable):
            yield _store(association, path, number % 0xFFFF + 1)


def _syntax_of(path: Path) -> tuple[str, str] | None:
    try:
        header = dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID"])
        return str(header.SOPClassUID), str(header.file_meta.TransferSyntaxUID)
    except (OSError, InvalidDicomError, AttributeError):
        return None


@contextmanager
def associated(
    offers: Sequence[tuple[str, str]], destination: Destination, handlers: Sequence[EventHandlerType] = ()
) -> Iterator[Association]:
    """An established association; released at the end, aborted if the block fails.

    Args:
        offers: (abstract syntax, transfer syntax), one presentation context each.
        destination: whom to call.
        handlers: of pynetdicom, for what the other side asks of us.

    Raises:
        Retryable: DESTINATION_UNREACHABLE.
        Permanent: DESTINATION_REFUSED.
    """
    entity = AE(ae_title=destination.calling_ae_title)
    entity.connection_timeout, entity.acse_timeout = CONNECT_SECONDS, CONNECT_SECONDS
    entity.dimse_timeout = entity.network_timeout = ANSWER_SECONDS
    try:
        association = entity.associate(
            destination.host,
            destination.port,
            contexts=[build_context(abstract, syntax) for abstract, syntax in offers],
            ae_title=destination.ae_title,
            max_pdu=PDU_BYTES,
            evt_handlers=list(handlers),
        )
    except OSError as error:  # the name does not resolve, now
        raise Retryable(Reason.DESTINATION_UNREACHABLE, f"{destination.name}: {error}") from error
    if not association.is_established:
        raise _refusal(association)
    with ExitStack() as interrupted:
        interrupted.callback(association.abort)
        yield association
        interrupted.pop_all()
    association.release()


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


def _refusal(association: Association) -> Permanent | Retryable:
    """Why there is no association: a final refusal, or something that may pass."""
    answer = association.acceptor.primitive
    if association.is_rejected and answer is not None:
        words = f"association rejected: {answer.reason_str} ({answer.source_str}, {answer.result_str})"
        if answer.result == REJECTED_TRANSIENT:
            return Retryable(Reason.DESTINATION_UNREACHABLE, words)
        return Permanent(Reason.DESTINATION_REFUSED, words)
    if association.rejected_contexts:
        names = sorted({UID(context.abstract_syntax or "").name for context in association.rejected_contexts})
        return Permanent(Reason.DESTINATION_REFUSED, f"no presentation context accepted for {', '.join(names)}")
    return Retryable(Reason.DESTINATION_UNREACHABLE, "no connection, or the association was aborted")


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
    text = f"0x{status:04X} {STATUS_TEXT.get(status, '')}".strip()
    return Answer(path, verdict_of(status), status, text)


def verdict_of(status: int) -> Verdict:
    """What a status means.

    0x0111 counts as sent: our UIDs are a digest of sources, model and settings, so the same UID is the same image, and
    it is what a strict archive answers when its first answer was lost on the way.
    """
    if status == SUCCESS:
        return Verdict.SENT
    if status in WARNINGS or status == DUPLICATE_SOP_INSTANCE:
        return Verdict.SENT_WITH_WARNING
    if status in OUT_OF_RESOURCES or status in {PROCESSING_FAILURE, RESOURCE_LIMITATION}:
        return Verdict.BUSY
    return Verdict.REFUSED
