"""The conformance statement says what the code does: its tables are written from the code.

`python -m tests.docs.test_conformance` writes the tables anew.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from models import quality
from service.core.dicom.accepted import SOP_CLASSES, TRANSFER_SYNTAXES
from service.core.job import Kind
from service.core.settings import Settings
from service.dicom import listener
from tests.docs.test_readme import replaced
from worker.compose.attributes import OBJECT_TABLE, PATIENT_AND_STUDY, render_table
from worker.compose.results import STORED_AS
from worker.deliver import sending as delivery

COMMITMENT = "1.2.840.10008.1.20.1"
CONFORMANCE = Path(__file__).parents[2] / "deploy" / "conformance.md"


def sop_classes() -> str:
    """Which SOP class in which role, with which transfer syntaxes."""
    plain = "Explicit VR Little Endian, Implicit VR Little Endian"
    rows = ["| SOP class | UID | Role | Transfer syntaxes |", "|---|---|---|---|"]
    rows += [
        f"| {UID(listener.VERIFICATION).name} | {listener.VERIFICATION} | {role} | {plain} |" for role in ("SCP", "SCU")
    ]
    rows += [f"| {uid.name} | {uid} | SCP | all of the table below |" for uid in SOP_CLASSES]
    sent = sorted(set(STORED_AS.values()))
    rows += [f"| {uid.name} | {uid} | SCU | {plain} |" for uid in sent]
    rows += [f"| {UID(COMMITMENT).name} | {COMMITMENT} | {role} | {plain} |" for role in ("SCU", "SCP")]
    return "\n".join([*rows, ""])


def transfer_syntaxes() -> str:
    rows = ["| Transfer syntax | UID |", "|---|---|", *(f"| {uid.name} | {uid} |" for uid in TRANSFER_SYNTAXES)]
    return "\n".join([*rows, ""])


def kinds() -> str:
    """What is made of a job, where it is switched on, and how."""
    default = Settings.model_fields["results"].default
    rows = ["| Kind | SOP class | By default |", "|---|---|---|"]
    rows += [f"| `{kind.value}` | {STORED_AS[kind].name} | {'yes' if kind in default else 'no'} |" for kind in Kind]
    return "\n".join([*rows, ""])


def answers() -> str:
    """What the answers of a destination mean."""
    rows = ["| Status | Meaning | What follows |", "|---|---|---|"]
    codes = [0x0000, *delivery.STATUS_TEXT, 0xA700, 0xA900, 0xC000]
    for code in sorted(set(codes)):
        text = delivery.STATUS_TEXT.get(code, {0: "success", 0xA700: "out of resources (A7xx)"}.get(code, "refused"))
        rows.append(f"| {code:04X} | {text} | {delivery.verdict_of(code).value} |")
    return "\n".join([*rows, ""])


def written(text: str) -> str:
    blocks = {
        "sop-classes": sop_classes(),
        "transfer-syntaxes": transfer_syntaxes(),
        "kinds": kinds(),
        "answers": answers(),
        "derived-attributes": render_table(),
        "object-attributes": render_table(OBJECT_TABLE[len(PATIENT_AND_STUDY) :]),
        "quality-limits": quality.render_table(),
    }
    for name, content in blocks.items():
        text = replaced(text, name, content)
    return text


def test_the_tables_of_the_conformance_statement_are_those_of_the_code() -> None:
    text = CONFORMANCE.read_text(encoding="utf-8")
    assert text == written(text)
    assert text.count(": begin") == 7


def test_every_status_that_the_listener_answers_is_in_the_statement() -> None:
    text = CONFORMANCE.read_text(encoding="utf-8")
    names = ("SUCCESS", "OUT_OF_RESOURCES", "DATA_SET_MISMATCH", "NOT_UNDERSTOOD", "CONFLICTING_DUPLICATE")
    for name in (*names, "NOT_SUPPORTED", "UNEXPECTED"):
        assert re.search(rf"^\| {getattr(listener, name):04X} \|", text, re.MULTILINE), name


def test_results_are_offered_as_the_statement_says() -> None:
    offers = delivery.offers_for([(str(uid), str(ExplicitVRLittleEndian)) for uid in STORED_AS.values()])
    assert {uid for uid, _ in offers} == set(STORED_AS.values())
    assert {syntax for _, syntax in offers} == {ExplicitVRLittleEndian, ImplicitVRLittleEndian}


if __name__ == "__main__":
    CONFORMANCE.write_text(written(CONFORMANCE.read_text(encoding="utf-8")), encoding="utf-8")
