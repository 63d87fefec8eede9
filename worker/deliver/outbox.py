"""What a claimed job still has to send: its rows are read once, with the claim, and kept here as the answers come in.

Hides the rows. It may keep them because nobody else changes what is to be sent while the attempt holds the job: whoever
takes the job over, or has it sent again, raises the attempt number, and the ledger refuses what is noted here then.
Must never let an answer wait: it is in the ledger before the next instance is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from service.core.errors import Permanent, Reason, Retryable
from service.core.ledger import ClaimedDelivery, Delivery, DeliveryStatus, Ledger
from service.core.settings import Destination, Settings
from worker.deliver.sending import Answer, Verdict, syntaxes_of
from worker.lease import SupersededError

STATUS_OF_VERDICT = {
    Verdict.SENT: DeliveryStatus.SENT,
    Verdict.SENT_WITH_WARNING: DeliveryStatus.SENT,
    Verdict.REFUSED: DeliveryStatus.FAILED,
    Verdict.BUSY: DeliveryStatus.PENDING,
}


def destination_called(name: str, settings: Settings) -> Destination:
    """The destination of that name.

    Raises:
        Permanent: DESTINATION_REFUSED, the site file has it no more.
    """
    destination = settings.destination(name)
    if destination is None:
        raise Permanent(Reason.DESTINATION_REFUSED, f"no destination is called {name} any more")
    return destination


class Outbox:
    """One claimed job's result instances, for all its destinations.

    Args:
        ledger: where answers are noted.
        claimed: the job and its rows.
        folder: the job's result.

    Raises:
        Permanent: RESULT_LOST. Half a result is not sent: another run makes it anew, with the same UIDs.
    """

    def __init__(self, ledger: Ledger, claimed: ClaimedDelivery, folder: Path) -> None:
        self._ledger, self._job, self._folder = ledger, claimed.job, folder
        self._rows = {(row.destination, row.path): row for row in claimed.deliveries}
        pending = self._with(DeliveryStatus.PENDING)
        self._syntaxes = syntaxes_of(sorted({folder / row.path for row in pending}))
        self.destinations = sorted({row.destination for row in pending})
        if lost := sum(syntax is None for syntax in self._syntaxes.values()):
            raise Permanent(Reason.RESULT_LOST, f"{lost} of {len(self._syntaxes)} files to send are gone or damaged")

    @property
    def fraction(self) -> float:
        """How much of everything is sent, 0..1."""
        return len(self._with(DeliveryStatus.SENT)) / max(len(self._rows), 1)

    def files_for(self, destination: str) -> dict[Path, tuple[str, str] | None]:
        """The files that it still lacks, as `worker.deliver.sending.send` wants them."""
        paths = [self._folder / row.path for row in self._pending_for(destination)]
        return {path: self._syntaxes[path] for path in paths}

    def note(self, destination: str, answer: Answer) -> None:
        """Keep what it said about one file.

        Raises:
            SupersededError: the job is no longer ours.
        """
        row = self._rows[destination, answer.path.relative_to(self._folder).as_posix()]
        text = "" if answer.verdict is Verdict.SENT else answer.text
        self._record(row, STATUS_OF_VERDICT[answer.verdict], answer.status, text)

    def refuse(self, destination: str, detail: str) -> None:
        """Whatever it still lacks, it will not take.

        Raises:
            SupersededError: the job is no longer ours.
        """
        for row in self._pending_for(destination):
            self._record(row, DeliveryStatus.FAILED, None, detail)

    def conclude(self, troubles: Sequence[Retryable | Permanent]) -> None:
        """Return if everything is sent.

        Args:
            troubles: what ended the sending to some destination early.

        Raises:
            Retryable: DESTINATION_UNREACHABLE, something is left to send.
            Permanent: DESTINATION_REFUSED, something was refused.
        """
        sentence = f"{len(self._with(DeliveryStatus.SENT))} of {len(self._rows)} instances sent"
        if self._with(DeliveryStatus.PENDING):
            details = "; ".join([sentence, *(trouble.detail for trouble in troubles)])
            raise Retryable(Reason.DESTINATION_UNREACHABLE, details)
        if refused := self._with(DeliveryStatus.FAILED):
            refusals = sorted({row.last_error for row in refused})
            raise Permanent(Reason.DESTINATION_REFUSED, "; ".join([sentence, *refusals]))

    def _with(self, status: DeliveryStatus) -> list[Delivery]:
        return [row for row in self._rows.values() if row.status is status]

    def _pending_for(self, destination: str) -> list[Delivery]:
        return [row for row in self._with(DeliveryStatus.PENDING) if row.destination == destination]

    def _record(self, row: Delivery, status: DeliveryStatus, dimse_status: int | None, error: str) -> None:
        is_ours = self._ledger.deliveries.record(
            self._job.id,
            row.destination,
            row.sop_instance_uid,
            status,
            dimse_status=dimse_status,
            error=error,
            attempt=self._job.attempt,
        )
        if not is_ours:
            raise SupersededError
        self._rows[row.destination, row.path] = replace(row, status=status, last_error=error)
