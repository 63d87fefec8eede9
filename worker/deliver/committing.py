"""Asking a PACS to commit itself to keep what we sent: storage commitment as SCU (PS3.4 annex J, PS3.7 section 10.1.4).

Hides the association on which we ask, and on which some archives answer at once; most open one of their own, which is
the business of `service.dicom.commitment`. Must never take an accepted request for a commitment: that is the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import evt

from service.core.association import ANSWER_SECONDS, PLAIN_SYNTAXES, associated
from service.core.dicom.commitment import (
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    REQUEST,
    Reference,
    Report,
    Request,
    answering,
    report_in,
)
from service.core.dicom.status import COMMITMENT_TEXT, PROCESSING_FAILURE, RESOURCE_LIMITATION, SUCCESS, in_words
from service.core.errors import Permanent, Reason, Retryable
from service.core.ledger import LedgerError
from service.core.settings import Destination
from service.core.telemetry import Log

LOG = Log("commitment")
LOOK_SECONDS = 0.05
OFFERS = [(PUSH_MODEL, [syntax]) for syntax in PLAIN_SYNTAXES]
MAY_PASS = {PROCESSING_FAILURE, RESOURCE_LIMITATION}


def request_commitment(
    transaction_uid: str,
    references: Sequence[Reference],
    destination: Destination,
    on_report: Callable[[Report], object],
    is_answered: Callable[[], bool],
) -> None:
    """Ask, and keep the association for a while, since the answer may come on it.

    Args:
        transaction_uid: never used before.
        references: what the destination is to keep.
        destination: whom we ask.
        on_report: told what came on this association, on a thread of its own; raises MessageError to refuse it.
        is_answered: whether there is nothing more to wait for.

    Raises:
        Retryable: DESTINATION_UNREACHABLE, or COMMITMENT_REFUSED for a reason that may pass.
        Permanent: COMMITMENT_REFUSED, the destination does not know storage commitment or refuses the request.
    """

    def answer(event: Any) -> tuple[int, None]:  # pynetdicom has no types
        with answering(LOG, LedgerError, destination=destination.name) as status:
            on_report(report_in(event))
        return status[0], None

    try:
        with associated(
            destination,
            OFFERS,
            calling_ae_title=destination.calling_ae_title,
            answer_seconds=ANSWER_SECONDS,
            handlers=[(evt.EVT_N_EVENT_REPORT, answer)],
        ) as association:
            information = Request(transaction_uid, tuple(references)).to_dataset()
            try:
                response, _ = association.send_n_action(information, REQUEST, PUSH_MODEL, PUSH_MODEL_INSTANCE)
            except RuntimeError as error:  # pynetdicom: the association ended since we looked
                raise Retryable(Reason.DESTINATION_UNREACHABLE, "the association was lost") from error
            _refuse_failure(response)
            association.network_timeout = None  # it falls silent now; the deadline is ours
            deadline = time.monotonic() + destination.commitment_wait_seconds
            while association.is_established and time.monotonic() < deadline and not is_answered():
                time.sleep(LOOK_SECONDS)
    except Permanent as error:
        raise Permanent(Reason.COMMITMENT_REFUSED, error.detail) from error


def _refuse_failure(response: Dataset) -> None:
    """Raise what an N-ACTION-RSP other than success means (PS3.7 section 10.1.4.1.10)."""
    if "Status" not in response:
        raise Retryable(Reason.DESTINATION_UNREACHABLE, "no answer to the request for storage commitment")
    status = int(response.Status)
    if status != SUCCESS:
        kind = Retryable if status in MAY_PASS else Permanent
        said = in_words(status, COMMITMENT_TEXT)
        raise kind(Reason.COMMITMENT_REFUSED, f"request for storage commitment answered {said}")
