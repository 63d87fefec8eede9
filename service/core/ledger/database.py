"""The database under the ledger: connections, transactions, the one clock, and what its errors mean to us.

Hides the differences between SQLite (in WAL mode, one writer) and PostgreSQL, the migration of the tables, and
SQLAlchemy's exceptions: whatever a database says comes out as a `LedgerError`, so nobody above has to know SQLAlchemy.
Must never leave the file of the ledger readable by others than its owner, nor put values into the words of an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import URL, Connection, Engine, Row, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
    StatementError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import NullPool

from service.core.telemetry import Log

MIGRATION_LOCK = 0x10_36AD  # any constant: serialises migrations of several processes on PostgreSQL
CLOCK_SECONDS = 60  # two quartz clocks drift apart by milliseconds in that time
BUSY_SECONDS = 30  # how long a writer waits for the others on SQLite
LOG = Log("ledger")
OTHERS = 0o077  # the permissions of everybody but the owner
PRIVATE = 0o600


class LedgerError(Exception):
    """The database did not do what it was asked. The cause says why; the message only names its kind."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(type(cause).__name__)


class LedgerUnavailableError(LedgerError):
    """The database is away, busy or broken off: the same may succeed later."""


def kind_of(error: BaseException) -> str:
    """The kind of an error that opening the ledger raised; its own words may hold paths and passwords."""
    return str(error) if isinstance(error, LedgerError) else type(error).__name__


class Database:
    """Open connections to one database. Safe to share between threads; every process opens its own.

    Args:
        engine: made by `Database.open`.
        clock: gives the present moment, timezone-aware.
    """

    def __init__(self, engine: Engine, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._reader = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.now = clock

    @classmethod
    def open(cls, url: str, clock: Callable[[], datetime] | None = None) -> Database:
        """Connect and bring the tables up to date; several processes may do so at the same time.

        Raises:
            LedgerError: the database cannot be reached, or its tables cannot be brought up to date.
            OSError: the file or its folder cannot be made.
        """
        with _translated():
            engine = _engine(make_url(url))
            _migrate(engine)
            return cls(engine, clock or _clock_of(engine.url))

    def close(self) -> None:
        """Give back the connections."""
        self._engine.dispose()

    def ping(self) -> None:
        """Ask for one row.

        Raises:
            LedgerUnavailableError: the database cannot be reached.
        """
        self.read(text("SELECT 1"))

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """One transaction: committed, and durable, when the block ends; undone when it raises.

        Raises:
            LedgerError: also in place of what SQLAlchemy raises inside the block.
        """
        with _translated(), self._engine.begin() as connection:
            yield connection

    def read(self, query: Any) -> Sequence[Row[Any]]:
        """All rows of a query, outside of any transaction.

        Raises:
            LedgerError: the database did not answer.
        """
        with _translated(), self._reader.connect() as connection:
            return connection.execute(query).all()


def insert(connection: Connection, table: Table) -> Any:
    """An INSERT that knows ON CONFLICT, which the two databases spell in the same way."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def insert_new(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> int:
    """Insert what is not there yet. Returns how many of the rows were new."""
    new = insert(connection, table).on_conflict_do_nothing().returning(*table.primary_key)
    return sum(len(connection.execute(new.values(row)).all()) for row in rows)


def one_at_a_time(connection: Connection, study_uid: str) -> None:
    """Let no other transaction make or forget a job of this study. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        key = int.from_bytes(hashlib.sha256(study_uid.encode()).digest()[:8], signed=True)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def batches(uids: Sequence[str]) -> Iterator[Sequence[str]]:
    """SQLite limits the number of parameters."""
    return (uids[start : start + 500] for start in range(0, len(uids), 500))


@contextmanager
def _translated() -> Iterator[None]:
    """Errors of SQLAlchemy, of SQLite before it is there, and of Alembic, as ours. A caller's mistake stays one."""
    try:
        yield
    except (OperationalError, InterfaceError, DisconnectionError, PoolTimeoutError, sqlite3.OperationalError) as error:
        raise LedgerUnavailableError(error) from error
    except CommandError as error:  # the tables are of a later version of lowgad
        raise LedgerError(error) from error
    except (SQLAlchemyError, sqlite3.Error) as error:
        if isinstance(error, StatementError) and not isinstance(error, DBAPIError) and error.orig:
            raise error.orig from error  # a value that cannot be stored: the database was not even asked
        raise LedgerError(error) from error


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    if (url.database or "").startswith("file:"):
        raise LedgerError(ValueError("sqlite:///file: URLs are not supported"))
    if url.database and url.database != ":memory:":
        path = Path(url.database)
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_private(path)
        _use_write_ahead_log(path)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions by itself
        connection.execute("PRAGMA synchronous = FULL")  # a commit that was answered with 0x0000 survives a power cut
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Taking the write lock at once lets writers queue; a lock upgraded later fails instead of waiting.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _keep_private(path: Path) -> None:
    """Only the owner reads or writes the ledger. SQLite gives its companions the permissions of the file itself."""
    path.touch(mode=PRIVATE)
    for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        with contextlib.suppress(FileNotFoundError):  # the companions come and go
            if file.is_file() and file.stat().st_mode & OTHERS:
                _close_to_others(file)


def _close_to_others(file: Path) -> None:
    try:
        file.chmod(PRIVATE)
    except PermissionError:  # another user's file, or a file system without permissions
        LOG.warning("others can read the ledger, and its permissions cannot be changed", path=str(file))


def _use_write_ahead_log(path: Path) -> None:
    """Switch the file to WAL for good. SQLite does not wait for its lock here, so of several processes we do."""
    deadline = time.monotonic() + BUSY_SECONDS
    with contextlib.closing(sqlite3.connect(path)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", "service.core.ledger:migrations")
    config.set_main_option("path_separator", "os")
    head = ScriptDirectory.from_config(config).get_current_head()
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        if MigrationContext.configure(connection).get_current_revision() != head:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


class _ServerClock:
    """The clock of a PostgreSQL server. It is asked once a minute, and followed by our own monotonic clock between."""

    def __init__(self, url: URL) -> None:
        self._engine = create_engine(url, poolclass=NullPool)  # never waits for a connection that its caller holds
        self._known = self._ask()

    def __call__(self) -> datetime:
        if time.monotonic() - self._known[1] > CLOCK_SECONDS:
            with contextlib.suppress(LedgerError):  # while it is away, nothing can be written anyway
                self._known = self._ask()
        moment, asked_at = self._known
        return moment + timedelta(seconds=time.monotonic() - asked_at)

    def _ask(self) -> tuple[datetime, float]:
        with _translated(), self._engine.connect() as connection:
            before = time.monotonic()
            moment: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
            return moment.astimezone(UTC), (before + time.monotonic()) / 2


def _clock_of(url: URL) -> Callable[[], datetime]:
    """SQLite has no server: whoever writes to its file is on the same machine."""
    return _ServerClock(url) if url.get_backend_name() == "postgresql" else lambda: datetime.now(UTC)
