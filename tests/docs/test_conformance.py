"""The conformance statement says what the code does."""

from __future__ import annotations

from pathlib import Path

from worker.attributes import render_table

CONFORMANCE = Path(__file__).parents[2] / "deploy" / "conformance.md"


def test_the_table_of_derived_attributes_is_the_one_in_the_code() -> None:
    text = CONFORMANCE.read_text(encoding="utf-8")
    begin = "<!-- derived-attributes: begin (written by worker.attributes.render_table) -->\n"
    written = text.split(begin)[1].split("<!-- derived-attributes: end -->")[0]
    assert written == render_table()
