"""How long to wait before something is tried again: doubled every time, capped, with the upper half random.

Hides the rule, and which settings feed it. The jitter keeps many jobs that failed together from coming back together;
without a cap the tenth pause is a thousand times the first. Must never decide whether to try again: that is the
caller's, who counts the tries.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta

from service.core.settings import Settings

LONGEST_COMPUTING_SECONDS = 600.0  # a worker that comes back must not stand idle for long
_JITTER = random.Random()


@dataclass(frozen=True)
class Backoff:
    """One rule with its two numbers."""

    first_seconds: float
    longest_seconds: float

    def pause(self, tries: int, rng: random.Random = _JITTER) -> timedelta:
        """The pause after `tries` (1, 2, ...) have failed."""
        longest = min(self.longest_seconds, self.first_seconds * 2.0 ** min(tries - 1, 30))
        return timedelta(seconds=longest * rng.uniform(0.5, 1.0))


def computing(settings: Settings) -> Backoff:
    """Before a job is computed again."""
    return Backoff(settings.retry_seconds, LONGEST_COMPUTING_SECONDS)


def sending(settings: Settings) -> Backoff:
    """Before something is sent again: a result, or a report of storage commitment."""
    return Backoff(settings.delivery_retry_seconds, settings.delivery_retry_max_seconds)


def asking(settings: Settings) -> Backoff:
    """Before a destination is asked again for storage commitment."""
    return Backoff(settings.delivery_retry_seconds, settings.commitment_timeout_seconds)
