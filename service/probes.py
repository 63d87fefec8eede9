"""Probes: is everything there that lowgad needs to work? The same for `/readyz` and `lowgad doctor`.

Hides what each look does, and how a failure becomes a sentence with the setting to look at. A probe changes nothing.
Must never tell a setting's value, which may be a secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from celery import Celery

from service.core.ledger import Ledger, LedgerError
from service.core.queue import is_reachable
from service.core.spool import Spool


class ProbeFailedError(Exception):
    """What is wrong, and what to do about it."""


@dataclass(frozen=True)
class Probe:
    """One thing to look at. `look` gives a detail, or raises ProbeFailedError."""

    name: str
    look: Callable[[], str]


@dataclass(frozen=True)
class Finding:
    """What a probe found."""

    name: str
    ok: bool
    detail: str


def examine(probes: Sequence[Probe]) -> Iterator[Finding]:
    """Look at one after the other."""
    for probe in probes:
        try:
            yield Finding(probe.name, ok=True, detail=probe.look())
        except ProbeFailedError as error:
            yield Finding(probe.name, ok=False, detail=str(error))


def database(ledger: Ledger) -> str:
    """Whether the ledger answers."""
    try:
        ledger.ping()
    except LedgerError as error:
        raise ProbeFailedError(f"does not answer ({error}); see database_url and data_dir") from None
    return "answers"


def writable(spool: Spool) -> str:
    """Whether something can be written to the spool."""
    try:
        with spool.workspace() as folder:
            (folder / "probe").write_bytes(b"probe")
    except OSError as error:
        raise ProbeFailedError(f"cannot be written ({type(error).__name__}); see data_dir") from None
    return "can be written"


def disk(spool: Spool) -> str:
    """Whether there is room for more."""
    free = f"{spool.free_bytes() >> 20} MiB free"
    if spool.is_low():
        raise ProbeFailedError(f"{free}, less than disk_low_bytes: everything is refused until space is freed")
    return free


def broker(queue: Celery) -> str:
    """Whether the broker answers; while it does not, studies are taken in all the same."""
    if not is_reachable(queue):
        raise ProbeFailedError("does not answer; studies are taken in but not computed; see broker_url")
    return "answers"
