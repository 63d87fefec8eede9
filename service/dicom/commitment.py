"""Storage commitment at our listener (PS3.4 annex J): the reports of archives, and requests of those who sent to us.

Hides both directions. As SCU: an archive reports on an association of its own; only a transaction of ours, from the AE
title that reports for the destination that we asked, changes anything. As SCP: a request is noted, and answered from a
thread of its own on a new association to an address that the site file gives. Must never commit to an instance whose
bytes were not just read back and found whole, and never connect to an address that a message named.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.events import EventHandlerType

from service.core import actor
from service.core.association import PLAIN_SYNTAXES, associated
from service.core.dicom.commitment import (
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    MessageError,
    Reference,
    Report,
    answering,
    report_in,
    request_in,
)
from service.core.dicom.status import (
    CLASS_INSTANCE_CONFLICT,
    INVALID_ARGUMENT,
    NO_SUCH_OBJECT_INSTANCE,
    NOT_AUTHORISED,
    PROCESSING_FAILURE,
    SUCCESS,
)
from service.core.errors import LowgadError
from service.core.ledger import CommitmentRequest, Ledger, LedgerError
from service.core.retry import sending
from service.core.settings import CommitmentRequestor, Settings
from service.core.spool import Spool
from service.core.telemetry import Fields, Log

LOG = Log("commitment")

ANSWER_SECONDS = 30.0  # to one report
CLAIM_SECONDS = 300.0  # for reading the instances back and sending one report
MOST_TRIES = 12  # of one report


class StorageCommitment:
    """What the listener does about storage commitment. Safe to share between its threads.

    Args:
        settings: whom we ask, who may ask us.
        ledger: requests and transactions.
        spool: the bytes that are committed to.
        clock: gives the present moment, timezone-aware; unset: the ledger's.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        spool: Spool,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self._settings, self._ledger, self._spool, self._clock = settings, ledger, spool, clock or ledger.now

    def negotiate(self, entity: AE) -> None:
        """Let the listener's application entity accept it, where it is switched on.

        Who reports proposes the role of SCP (PS3.7 annex D.3.3.4), who asks the one of SCU: we agree to both.
        """
        asks = any(item.storage_commitment for item in self._settings.destinations)
        if asks or self._settings.commitment_requestors:
            entity.add_supported_context(PUSH_MODEL, list(PLAIN_SYNTAXES), scu_role=True, scp_role=True)

    def handlers(self) -> list[EventHandlerType]:
        """For pynetdicom's server."""
        return [(evt.EVT_N_ACTION, self._answer_request), (evt.EVT_N_EVENT_REPORT, self._answer_report)]

    def report_until(self, stop: threading.Event) -> None:
        """Send the reports that are due, until told to stop. Whatever goes wrong is logged and tried again."""
        while not stop.is_set():
            try:
                self.report_due()
            except Exception as error:  # noqa: BLE001  the end of a thread: nobody else would hear of it, or report again
                LOG.failure("reports were not sent; it will be repeated", error)
            stop.wait(self._settings.sweep_seconds)

    def report_due(self) -> None:
        """Send every report that is due."""
        while request := self._ledger.requests.claim(CLAIM_SECONDS):
            self._report(request)

    # --- what arrives -------------------------------------------------------------------------------------------------

    def _answer_request(self, event: Any) -> tuple[int, None]:  # pynetdicom has no types
        """N-ACTION: somebody asks us to keep what it sent."""
        peer = _peer(event)
        ae_title = peer["ae_title"]
        with answering(LOG, LedgerError, **peer) as answer:
            if self._requestor(ae_title) is None:
                raise MessageError(NOT_AUTHORISED, "this AE title is not among commitment_requestors")
            request = request_in(event)
            if not self._ledger.requests.add(ae_title, request):
                raise MessageError(INVALID_ARGUMENT, "this transaction is known with other instances")
            LOG.info("asked for storage commitment", ae_title=ae_title, count=len(request.references))
        return answer[0], None

    def _answer_report(self, event: Any) -> tuple[int, None]:
        """N-EVENT-REPORT: an archive says what it keeps of our results."""
        peer = _peer(event)
        ae_title = peer["ae_title"]
        with answering(LOG, LedgerError, **peer) as answer:
            report, asked = report_in(event), self._settings.reported_by(ae_title)
            noted = self._ledger.commitments.answer(report, asked, actor=actor.peer(ae_title))
            counts = {"storage committed": noted.committed, "storage commitment refused": noted.refused}
            for words, count in counts.items():
                if count:
                    LOG.info(words, job_id=noted.job_id, ae_title=ae_title, count=count)
        return answer[0], None

    def _requestor(self, ae_title: str) -> CommitmentRequestor | None:
        return next((item for item in self._settings.commitment_requestors if item.ae_title == ae_title), None)

    # --- what we report -----------------------------------------------------------------------------------------------

    def _report(self, request: CommitmentRequest) -> None:
        """Say what is safe now, and come back later where nobody listens."""
        requestor = self._requestor(request.ae_title)
        if requestor is None:
            LOG.warning("commitment not reported: no longer among commitment_requestors", ae_title=request.ae_title)
            self._ledger.requests.settle(request, None)
            return
        if request.tries > MOST_TRIES:
            LOG.warning("commitment report given up: it ended in an error every time", ae_title=request.ae_title)
            self._ledger.requests.settle(request, None)
            return
        status = self._send(self._judge(request), requestor)
        if status is None and request.tries < MOST_TRIES:
            pause = sending(self._settings).pause(request.tries)
            LOG.warning("commitment not reported; it will be tried again", ae_title=request.ae_title)
            self._ledger.requests.settle(request, self._clock() + pause)
            return
        if status == SUCCESS:
            LOG.info("commitment reported", ae_title=request.ae_title, count=len(request.references))
        else:
            LOG.warning("commitment report given up", ae_title=request.ae_title, status=status or 0)
        self._ledger.requests.settle(request, None)

    def _judge(self, request: CommitmentRequest) -> Report:
        reasons = {reference: self._why_not(reference) for reference in request.references}
        committed = tuple(reference for reference, reason in reasons.items() if reason is None)
        failed = tuple((reference, reason) for reference, reason in reasons.items() if reason is not None)
        return Report(request.transaction_uid, committed, failed)

    def _why_not(self, reference: Reference) -> int | None:
        """The Failure Reason for an instance that we cannot commit to; None: ledger and spool hold it whole."""
        known = self._ledger.received.get(reference.sop_instance_uid)
        if known is None:
            return NO_SUCH_OBJECT_INSTANCE
        if known.sop_class_uid != reference.sop_class_uid:
            return CLASS_INSTANCE_CONFLICT
        if not self._spool.is_whole(known.sha256):
            LOG.warning("an object of the spool is gone or damaged", sha256=known.sha256)
            return PROCESSING_FAILURE
        return None

    def _send(self, report: Report, requestor: CommitmentRequestor) -> int | None:
        """N-EVENT-REPORT on a new association; the status that was answered, None where nobody answered."""
        try:
            with associated(
                requestor,
                [(PUSH_MODEL, PLAIN_SYNTAXES)],
                calling_ae_title=self._settings.ae_title,
                as_provider_of=[PUSH_MODEL],
                answer_seconds=ANSWER_SECONDS,
            ) as association:
                return _send_report(association, report)
        except LowgadError:  # whatever it refuses, it is asked again later
            return None


def _peer(event: Any) -> Fields:
    """Who sent a message that has arrived as a whole."""
    event.assoc.dul.socket.recv.message_ended()
    requestor = event.assoc.requestor
    return Fields(ae_title=str(requestor.ae_title).strip(), peer=requestor.address)


def _send_report(association: Association, report: Report) -> int | None:
    try:
        response, _ = association.send_n_event_report(
            report.to_dataset(), report.event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE
        )
    except (RuntimeError, ValueError):  # pynetdicom: the association ended, or the context was not accepted
        return None
    return int(response.Status) if "Status" in response else None
