"""`lowgad doctor`: is everything there that lowgad needs to work? One line for each check.

Hides what each check does. A check changes nothing except that the ledger's tables are brought up to date. Must never
print a setting's value, which may be a secret.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from service import probes
from service.core.association import PLAIN_SYNTAXES, VERIFICATION, associated
from service.core.dicom.commitment import PUSH_MODEL
from service.core.dicom.status import SUCCESS
from service.core.errors import Permanent, Retryable
from service.core.ledger import Ledger, LedgerError, kind_of
from service.core.queue import make_celery
from service.core.settings import Destination, Settings
from service.core.spool import Spool
from service.probes import Probe, ProbeFailedError

ANSWER_SECONDS = 5.0
_WHERE = "see the site file and the destination's own list of AE titles"
OVERDUE_SECONDS = 300.0  # a listener that lives reports within seconds, one after the other


def checks(settings: Settings) -> list[Probe]:
    """Database, spool, disk, broker, every destination, and our reports to others where they may ask for them."""
    reports = [Probe("commitment reports", lambda: _reports(settings))] if settings.commitment_requestors else []
    return [
        Probe("database", lambda: _database(settings)),
        Probe("spool", lambda: _spool(settings)),
        Probe("broker", lambda: probes.broker(make_celery(settings))),
        *reports,
        *(Probe(f"destination {item.name}", partial(_destination, item)) for item in settings.destinations),
    ]


def _database(settings: Settings) -> str:
    try:
        with Ledger.open(settings.ledger_url) as ledger:
            jobs = sum(ledger.jobs.counts().values())
    except (LedgerError, OSError) as error:
        raise ProbeFailedError(f"cannot be opened ({kind_of(error)}); see database_url and data_dir") from None
    return f"tables are up to date, {jobs} jobs"


def _spool(settings: Settings) -> str:
    try:
        spool = Spool(settings.spool_dir, settings.disk_low_bytes)
    except OSError as error:
        raise ProbeFailedError(f"cannot be written ({type(error).__name__}); see data_dir") from None
    probes.writable(spool)
    return probes.disk(spool)


def _reports(settings: Settings) -> str:
    try:
        with Ledger.open(settings.ledger_url) as ledger:
            overdue = ledger.requests.overdue(OVERDUE_SECONDS + settings.sweep_seconds)
    except (LedgerError, OSError) as error:
        raise ProbeFailedError(f"cannot be told without the database ({kind_of(error)})") from None
    if overdue:
        raise ProbeFailedError(
            f"{overdue} are overdue: no listener sends them; is `lowgad listen` running, what is its log?"
        )
    return "none is overdue"


def _destination(destination: Destination) -> str:
    """C-ECHO (PS3.7 section 9.1.5), and whether it would be asked for storage commitment in vain."""
    wanted = [VERIFICATION, *([PUSH_MODEL] if destination.storage_commitment else [])]
    try:
        with associated(
            destination,
            [(uid, PLAIN_SYNTAXES) for uid in wanted],
            calling_ae_title=destination.calling_ae_title,
            connect_seconds=ANSWER_SECONDS,
            answer_seconds=ANSWER_SECONDS,
        ) as association:
            answer = _echo(association)
            accepted = {context.abstract_syntax for context in association.accepted_contexts}
    except Permanent as error:
        raise ProbeFailedError(f"refuses our AE titles or what we offer: {error.detail}; {_WHERE}") from None
    except Retryable as error:
        raise ProbeFailedError(f"does not answer: {error.detail}; {_WHERE}") from None
    if answer != SUCCESS:
        raise ProbeFailedError("does not answer C-ECHO")
    if destination.storage_commitment and PUSH_MODEL not in accepted:
        raise ProbeFailedError("answers C-ECHO and does not know storage commitment; switch storage_commitment off")
    return "answers C-ECHO"


def _echo(association: Any) -> int | None:
    """The status of C-ECHO (PS3.7 section 9.1.5); None where it is not accepted, or nothing comes back."""
    try:
        return getattr(association.send_c_echo(), "Status", None)
    except (ValueError, RuntimeError):  # pynetdicom: no accepted context, or the association ended
        return None
