from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from service.core import telemetry


def _raise(error: Exception, because_of: Exception) -> None:
    raise error from because_of


class Lines:
    def __init__(self) -> None:
        self.stream = io.StringIO()

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def last(self) -> dict[str, Any]:
        return self.all()[-1]


@pytest.fixture
def lines() -> Iterator[Lines]:
    root, ours = logging.getLogger(), logging.getLogger(telemetry.OUR_LOGGER)
    before = root.handlers[:], root.level, ours.level
    written = Lines()
    telemetry.configure(written.stream)
    yield written
    logging.captureWarnings(capture=False)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_a_line_is_json_with_its_fields(lines: Lines) -> None:
    telemetry.Log("listener").info("instance stored", peer="10.0.0.1", size=5)
    line = lines.last()
    assert line.pop("at").endswith("+00:00")
    assert line == {"level": "info", "message": "instance stored", "role": "listener", "peer": "10.0.0.1", "size": 5}


def test_a_field_that_is_not_on_the_list_is_refused(lines: Lines) -> None:
    with pytest.raises(TypeError, match="patient_name"):
        telemetry.Log("api").info("received", patient_name="Doe^Jane")  # type: ignore[call-arg]
    assert lines.all() == []


def test_an_exception_leaves_its_places_and_not_its_words(lines: Lines) -> None:
    error = ValueError("bad name Doe^Jane")
    with pytest.raises(ValueError, match="bad name"):
        _raise(error, because_of=KeyError("Doe^Jane"))
    telemetry.Log("worker").failure("unexpected", error, job_id="1")
    assert "Doe" not in lines.stream.getvalue()
    described = lines.last()["error"]
    assert described[0] == "ValueError"
    assert "KeyError" in described
    assert any("test_telemetry.py" in place for place in described)


def test_what_other_libraries_say_about_values_stays_out(lines: Lines) -> None:
    logging.getLogger("pynetdicom").error("bad value %s", "Doe^Jane")
    logging.getLogger("pydicom").error("bad value Doe^Jane")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("Invalid value for VR PN: 'Doe^Jane'", stacklevel=1)
    assert "Doe" not in lines.stream.getvalue()
    of_warning = lines.all()[2].pop("message")
    by_whom = f"a message of test_telemetry.{test_what_other_libraries_say_about_values_stays_out.__name__}"
    assert [line.get("message") for line in lines.all()][:2] == ["bad value %s", by_whom]
    assert re.fullmatch(r"UserWarning at .*test_telemetry\.py:\d+", of_warning)


def test_a_pseudonym_is_stable_and_shows_nothing_of_the_uid() -> None:
    assert telemetry.pseudonym("1.2.3") == telemetry.pseudonym("1.2.3") != telemetry.pseudonym("1.2.4")
    assert "1.2.3" not in telemetry.pseudonym("1.2.3")
