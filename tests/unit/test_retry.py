from __future__ import annotations

import random

from service.core.retry import Backoff, computing, sending
from service.core.settings import Settings


def test_the_wait_between_tries_doubles_is_capped_and_is_never_the_same_for_all() -> None:
    rng, rule = random.Random(1), Backoff(10.0, 300.0)
    waits = [rule.pause(tries, rng).total_seconds() for tries in range(1, 12)]
    assert all(5.0 <= waits[0] <= 10.0 and 10.0 <= wait <= 300.0 for wait in waits[1:])
    assert all(150.0 <= wait <= 300.0 for wait in waits[6:])
    assert len(set(waits)) == len(waits)
    assert rule.pause(100_000, rng).total_seconds() <= 300.0


def test_no_pause_grows_beyond_minutes_however_often_it_is_tried() -> None:
    for rule in (computing(Settings()), sending(Settings())):
        assert all(rule.pause(tries).total_seconds() <= 15 * 60 for tries in (10, 100, 100_000))
