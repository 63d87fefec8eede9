"""Fixtures that several kinds of test share."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from service.core.ledger import Ledger
from tests import postgres


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    programs = postgres.binaries()
    if programs is None:
        pytest.skip("PostgreSQL's server binaries are not installed")
    with postgres.server(programs) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, once for each database that is supported."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    server, name = request.getfixturevalue("postgres_server"), f"t{uuid4().hex}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type,unused-ignore]  the name is ours
    return f"{server}/{name}".replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture
def ledger(database_url: str, clock: Clock) -> Iterator[Ledger]:
    """An open ledger on each database, with a clock that the test moves."""
    with Ledger.open(database_url, clock) as opened:
        yield opened
