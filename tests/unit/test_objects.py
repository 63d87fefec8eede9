from __future__ import annotations

import contextlib
from io import BytesIO

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from service.core.errors import Permanent, Reason
from service.objects import from_file, from_wire
from tests.factories import encode, make_pair

# These bytes are bad on purpose, and pydicom warns about some of them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def a_slice() -> Dataset:
    return make_pair(slices=1).low[0]


def wire_bytes(dataset: Dataset, *, implicit: bool = False) -> bytes:
    stream = BytesIO()
    dataset.save_as(stream, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    return stream.getvalue()


def test_an_object_knows_its_identifiers() -> None:
    dataset = a_slice()
    received = from_file(encode(dataset))
    assert received.sop_instance_uid == dataset.SOPInstanceUID
    assert received.study_uid == dataset.StudyInstanceUID
    assert received.series_uid == dataset.SeriesInstanceUID
    assert received.sop_class_uid == dataset.SOPClassUID
    assert received.transfer_syntax_uid == ExplicitVRLittleEndian


@pytest.mark.parametrize("implicit", [False, True])
def test_the_same_data_set_gives_the_same_bytes_however_it_came(implicit: bool) -> None:
    dataset = a_slice()
    file = encode(dataset, implicit=implicit)
    syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    assert from_file(file).chunks == from_wire(wire_bytes(a_slice(), implicit=implicit), str(syntax)).chunks


def test_what_is_stored_is_a_dicom_file_with_the_data_set_untouched() -> None:
    file = encode(a_slice())
    stored = b"".join(from_file(file).chunks)
    again = dcmread(BytesIO(stored))
    assert again == dcmread(BytesIO(file))
    assert stored.endswith(wire_bytes(a_slice()))


def test_the_preamble_of_a_file_is_left_behind() -> None:
    file = encode(a_slice())
    hostile = b"MZ" + b"\x90" * 126 + file[128:]
    assert from_file(hostile).chunks == from_file(file).chunks


def test_patients_are_told_apart_and_not_named() -> None:
    one, same, other = (from_file(encode(make_pair(seed=seed, slices=1).pre[0])) for seed in (1, 1, 2))
    assert one.patient == same.patient != other.patient
    assert "SYNTH" not in one.patient


@pytest.mark.parametrize("keyword", ["PatientID", "PatientName"])
def test_patients_that_differ_in_letters_that_cannot_be_read_are_two(keyword: str) -> None:
    dataset = a_slice()
    dataset.SpecificCharacterSet, dataset.PatientID = "ISO_IR 192", ""
    setattr(dataset, keyword, "M?LLER")
    one, other = (from_file(encode(dataset).replace(b"M?LLER", b"M%cLLER" % letter)).patient for letter in b"\xdc\xd6")
    assert one != other


def test_a_patient_is_the_same_in_every_character_set() -> None:
    dataset, found = a_slice(), set()
    for charset in ("ISO_IR 100", "ISO_IR 192"):
        dataset.SpecificCharacterSet, dataset.PatientID = charset, "MÜLLER"
        found.add(from_file(encode(dataset)).patient)
    assert len(found) == 1


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
@pytest.mark.parametrize("value", ["", "../../etc/passwd", "1.2." + "3" * 80])
def test_an_object_without_proper_uids_is_unreadable(keyword: str, value: str) -> None:
    file = encode(a_slice())
    known = str(a_slice()[keyword].value)
    if len(value) > len(known):
        value = value[: len(known) - 1] + "/"
    with pytest.raises(Permanent) as caught:
        from_file(file.replace(known.encode(), value.encode().ljust(len(known), b"\0")))
    assert caught.value.reason is Reason.UNREADABLE_FILE


def test_a_deflated_object_is_not_inflated() -> None:
    with pytest.raises(Permanent) as caught:
        from_wire(b"anything", str(DeflatedExplicitVRLittleEndian))
    assert caught.value.reason is Reason.UNSUPPORTED_OBJECT


def test_sequences_nested_without_end_are_unreadable() -> None:
    encoded = b"".join(b"\x08\x00\x10\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" for _ in range(5000))
    with pytest.raises(Permanent) as caught:
        from_wire(encoded, str(ExplicitVRLittleEndian))
    assert caught.value.reason is Reason.UNREADABLE_FILE


@given(st.binary(max_size=300))
def test_any_bytes_are_an_object_or_are_refused(data: bytes) -> None:
    for attempt in (
        lambda: from_file(data),
        lambda: from_file(b"\0" * 128 + b"DICM" + data),
        lambda: from_wire(data, str(ExplicitVRLittleEndian)),
        lambda: from_wire(data, str(ImplicitVRLittleEndian)),
    ):
        with pytest.raises(Permanent):
            attempt()


@example(length=1425)  # an element of two-byte numbers that is left with one byte
@given(st.integers(0, 3000))
def test_a_file_cut_anywhere_is_an_object_or_is_refused(length: int) -> None:
    file = encode(make_pair(slices=1, rows=8, columns=8).pre[0])
    with contextlib.suppress(Permanent):
        assert from_file(file[:length]).sop_instance_uid
