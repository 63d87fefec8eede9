"""The messages of storage commitment (PS3.4 annex J): what one side asks the other to keep, and what that one answers.

Hides their data sets. Both halves of lowgad need them: the worker asks archives about results, worker and listener take
the archives' answers, and the listener is asked itself about what it received. Must never believe a message: size,
counts, UIDs and types are checked before anything is returned, and what does not fit is an error with the status that
PS3.7 sections 10.1.1.1.8 (N-EVENT-REPORT) and 10.1.4.1.10 (N-ACTION) have for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Unpack

from pydicom.dataset import Dataset
from pydicom.uid import UID

from service.core.dicom.accepted import DAMAGE
from service.core.dicom.status import (
    INVALID_ARGUMENT,
    NO_SUCH_ACTION,
    NO_SUCH_EVENT_TYPE,
    NO_SUCH_OBJECT_INSTANCE,
    PROCESSING_FAILURE,
    RESOURCE_LIMITATION,
    SUCCESS,
)
from service.core.telemetry import Fields, Log

PUSH_MODEL = UID("1.2.840.10008.1.20.1")  # SOP class, PS3.4 table J.3-1
PUSH_MODEL_INSTANCE = UID("1.2.840.10008.1.20.1.1")  # the one well-known instance that requests and reports name
REQUEST = 1  # Action Type ID
ALL_COMMITTED, FAILURES_EXIST = 1, 2  # Event Type ID
MOST_REFERENCES = 100_000  # a request for more is a mistake, or an attack
LONGEST_MESSAGE_BYTES = 1 << 25  # about 200 bytes an instance

_UID = re.compile(r"[0-9.]{1,64}")


class MessageError(ValueError):
    """A message that cannot be acted on. `status` is what to answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Reference:
    """One instance, as both sides name it."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True)
class Request:
    """Action Information of an N-ACTION (PS3.4 table J.3-1)."""

    transaction_uid: str
    references: tuple[Reference, ...]

    def to_dataset(self) -> Dataset:
        """As it is sent."""
        return _dataset(self.transaction_uid, map(_item, self.references))

    @classmethod
    def of(cls, information: Dataset) -> Request:
        """As it was received.

        Raises:
            MessageError: no transaction, no instances, or too many.
        """
        request = cls(_transaction_of(information), tuple(_references(information, "ReferencedSOPSequence")))
        if not request.references:
            raise MessageError(INVALID_ARGUMENT, "no instances are named")
        return request


@dataclass(frozen=True)
class Report:
    """Event Information of an N-EVENT-REPORT (PS3.4 table J.3-2)."""

    transaction_uid: str
    committed: tuple[Reference, ...]
    failed: tuple[tuple[Reference, int], ...] = ()  # with Failure Reason

    @property
    def event_type(self) -> int:
        """Event Type ID."""
        return FAILURES_EXIST if self.failed else ALL_COMMITTED

    def to_dataset(self) -> Dataset:
        """As it is sent."""
        dataset = _dataset(self.transaction_uid, map(_item, self.committed))
        if self.failed:
            dataset.FailedSOPSequence = [_item(reference) for reference, _ in self.failed]
            for item, (_, reason) in zip(dataset.FailedSOPSequence, self.failed, strict=True):
                item.FailureReason = reason
        return dataset

    @classmethod
    def of(cls, event_type: int | None, information: Dataset) -> Report:
        """As it was received. An instance that is named as committed and as failed counts as failed.

        Raises:
            MessageError: unknown type, no transaction, or too many instances.
        """
        if event_type not in {ALL_COMMITTED, FAILURES_EXIST}:
            raise MessageError(NO_SUCH_EVENT_TYPE, "unknown event type")
        failures = list(_references(information, "FailedSOPSequence"))
        reasons = [_failure_reason(item) for item in information.get("FailedSOPSequence") or ()]
        lost = set(failures)
        committed = [item for item in _references(information, "ReferencedSOPSequence") if item not in lost]
        return cls(_transaction_of(information), tuple(committed), tuple(zip(failures, reasons, strict=True)))


def request_in(event: Any) -> Request:
    """The request that an N-ACTION brings, as pynetdicom, which has no types, tells of it.

    Raises:
        MessageError: too long, another action or instance, or as `Request.of`.
        service.core.dicom.accepted.DAMAGE: the data set cannot be read.
    """
    _refuse_size(event.request.ActionInformation)
    if event.action_type != REQUEST:
        raise MessageError(NO_SUCH_ACTION, "unknown action type")
    _refuse_other_instance(event.request.RequestedSOPInstanceUID)
    return Request.of(event.action_information)


def report_in(event: Any) -> Report:
    """The report that an N-EVENT-REPORT brings, on whosever association.

    Raises:
        MessageError: too long, another instance, or as `Report.of`.
        service.core.dicom.accepted.DAMAGE: the data set cannot be read.
    """
    _refuse_size(event.request.EventInformation)
    _refuse_other_instance(event.request.AffectedSOPInstanceUID)
    return Report.of(event.event_type, event.event_information)


@contextmanager
def answering(log: Log, passing: type[Exception], **peer: Unpack[Fields]) -> Iterator[list[int]]:
    """Gives a list whose one item is the status to answer with, once the block has ended, however it did.

    Args:
        log: told of every message that is not taken.
        passing: what is raised while we cannot note anything, so that the other side comes again.
        peer: who sent it, for the log.
    """
    answer = [SUCCESS]
    try:
        yield answer
    except MessageError as error:
        answer[0] = error.status
        log.warning(str(error), **(peer | Fields(status=error.status)))
    except passing as error:
        answer[0] = RESOURCE_LIMITATION
        log.failure("storage commitment: the database did not answer", error, **(peer | Fields(status=answer[0])))
    except DAMAGE as error:
        answer[0] = INVALID_ARGUMENT
        log.failure("storage commitment: the message cannot be read", error, **(peer | Fields(status=answer[0])))


def _refuse_size(information: Any) -> None:
    if information is None:
        raise MessageError(INVALID_ARGUMENT, "a message without information")
    if information.getbuffer().nbytes > LONGEST_MESSAGE_BYTES:
        raise MessageError(RESOURCE_LIMITATION, "the message is too long")


def _refuse_other_instance(sop_instance_uid: Any) -> None:
    if sop_instance_uid != PUSH_MODEL_INSTANCE:
        raise MessageError(NO_SUCH_OBJECT_INSTANCE, "not the well-known instance of storage commitment")


def _dataset(transaction_uid: str, items: Iterable[Dataset]) -> Dataset:
    dataset = Dataset()
    dataset.TransactionUID = transaction_uid
    if several := list(items):
        dataset.ReferencedSOPSequence = several
    return dataset


def _item(reference: Reference) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = reference.sop_class_uid
    item.ReferencedSOPInstanceUID = reference.sop_instance_uid
    return item


def _transaction_of(information: Dataset) -> str:
    return _uid(information, "TransactionUID")


def _references(information: Dataset, keyword: str) -> Iterator[Reference]:
    items = information.get(keyword) or ()
    if len(items) > MOST_REFERENCES:
        raise MessageError(RESOURCE_LIMITATION, "too many instances at once")
    return (Reference(_uid(item, "ReferencedSOPClassUID"), _uid(item, "ReferencedSOPInstanceUID")) for item in items)


def _failure_reason(item: Dataset) -> int:
    try:
        return int(item.get("FailureReason") or PROCESSING_FAILURE)
    except (TypeError, ValueError):
        return PROCESSING_FAILURE


def _uid(dataset: Dataset, keyword: str) -> str:
    value = str(dataset.get(keyword) or "").strip("\0 ")
    if not _UID.fullmatch(value):
        raise MessageError(INVALID_ARGUMENT, f"{keyword} is missing or not a UID")
    return value
