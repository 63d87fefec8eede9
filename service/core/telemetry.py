"""Logs: one JSON object a line, with a fixed set of keys, so that no patient data can get in.

Hides the logging module. Our own lines are made of a constant sentence and the fields of `Fields`, none of which can
hold a name, an identifier of a patient or a DICOM UID. Of other libraries only the constant part of a message is kept,
never its arguments; of an exception its type and where it was raised, never its words. Must never be bypassed by print.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import TextIO, TypedDict, Unpack

OUR_LOGGER = "lowgad"


class Fields(TypedDict, total=False):
    """Everything that a line of the log may carry beside its sentence."""

    job_id: str
    study: str  # `pseudonym` of a StudyInstanceUID
    attempt: int
    state: str
    stage: str
    reason: str  # name of a service.core.errors.Reason
    actor: str
    ae_title: str
    peer: str  # network address
    destination: str  # name in the site file
    status: int  # DIMSE or HTTP status
    sha256: str
    count: int
    size: int  # bytes
    seconds: float
    port: int
    pid: int
    path: str  # of a route or of our own file; never one a sender chose
    role: str


class Log:
    """Writes lines. One for each role: listener, intake, api, worker, supervisor."""

    def __init__(self, role: str) -> None:
        self._role, self._logger = role, logging.getLogger(f"{OUR_LOGGER}.{role}")

    def info(self, sentence: str, **fields: Unpack[Fields]) -> None:
        """Something an operator may want to follow."""
        self._write(logging.INFO, sentence, fields)

    def warning(self, sentence: str, **fields: Unpack[Fields]) -> None:
        """Something that somebody should look at, and that the service survives by itself."""
        self._write(logging.WARNING, sentence, fields)

    def failure(self, sentence: str, error: BaseException, **fields: Unpack[Fields]) -> None:
        """Something that did not work. Of the exception only type and places are kept."""
        self._write(logging.ERROR, sentence, fields, error)

    def _write(self, level: int, sentence: str, fields: Fields, error: BaseException | None = None) -> None:
        if unknown := fields.keys() - Fields.__annotations__.keys():
            raise TypeError(f"the log has no field {', '.join(sorted(unknown))}")
        extra = {"fields": {"role": self._role, **fields}}
        self._logger.log(level, "%s", sentence, extra=extra, exc_info=error)


def configure(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send all logging of this process through our format. Called once, by the command line."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger(OUR_LOGGER).setLevel(level)
    # Warnings of DICOM libraries quote values. With this they become log lines, of which we keep the constant part.
    logging.captureWarnings(capture=True)


def pseudonym(uid: str) -> str:
    """A short stand-in for a DICOM UID: the same for the same UID, and not to be turned back."""
    return hashlib.sha256(uid.encode()).hexdigest()[:12]


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        if record.name.startswith(OUR_LOGGER):
            line |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        else:
            line |= {"message": _constant_part(record), "logger": record.name, "line": record.lineno}
        if record.exc_info and record.exc_info[1]:
            line["error"] = _describe(record.exc_info[1])
        return json.dumps(line)


_WARNING = re.compile(r"(?P<place>[^\s:]+\.py:\d+): (?P<category>\w+): ")  # how `warnings` writes one


def _constant_part(record: logging.LogRecord) -> str:
    """What a library's message says without the values in it; where it has no such part, who wrote it."""
    if record.name == "py.warnings":
        found = _WARNING.match(record.getMessage())
        return f"{found['category']} at {found['place']}" if found else "a warning"
    if record.args and isinstance(record.msg, str) and re.search("[a-z]{2}", record.msg):
        return record.msg
    return f"a message of {record.module}.{record.funcName}"


def _describe(error: BaseException) -> list[str]:
    """Type and places of an exception and its causes; the words may quote what was sent to us."""
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    cause = error.__cause__ or error.__context__
    return [type(error).__qualname__, *places, *(_describe(cause) if cause else [])]
