"""Who did something to a job, and where a study came from: the words for both, in one place.

Hides how they are spelled; the ledger keeps them, dashboard and REST show them, and nothing parses them. Must never
name a person: a role, with the AE title, address or host that it acted from.
"""

from __future__ import annotations

LEDGER = "ledger"  # what follows from something else, as when one job supersedes another
INTAKE = "intake"  # the sweep
REST = "rest"  # as the source of a study that was uploaded


def peer(ae_title: str) -> str:
    """Whoever called us over DICOM."""
    return f"dimse:{ae_title}"


def client(address: str) -> str:
    """Whoever called the REST interface, by network address; empty where it is not known."""
    return f"{REST}:{address}"


def operator(address: str) -> str:
    """Whoever pressed a button on the dashboard."""
    return f"dashboard:{address}"


def worker(host: str, pid: int) -> str:
    """One process of a worker."""
    return f"worker:{host}:{pid}"
