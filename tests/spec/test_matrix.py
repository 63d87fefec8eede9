"""Studies as vendors write them, each with what has to come of it: one table, read as far as the acquisition.

At the end the same head from two vendors goes through the whole pipeline, against the head without any DICOM.

A row is a flavour (what `make_pair` is asked for), a form (how the two series become objects), a transfer syntax, and
the expected end: a refusal by name, or roles, agent, dose, field strength, sequence, spacing, unit and character set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from models.agents import AGENTS
from models.runtime import LinearEngine
from service.core.dicom.accepted import TRANSFER_SYNTAXES
from service.core.errors import Permanent, Reason
from service.core.job import JobOptions, Kind
from tests.factories import (
    SyntheticPair,
    as_concatenation,
    as_enhanced,
    as_legacy_converted,
    as_stacks,
    compress_file,
    encode,
    make_localizer,
    make_pair,
    uid,
)
from tests.numeric.phantoms import conditions, head, prepared_head
from worker.choose.acquisition import Acquisition, check_acquisition, read_acquisition
from worker.choose.pairing import Pair, choose_pair
from worker.compose.context import DerivationContext, Outputs
from worker.compose.derived import derive
from worker.pipeline import Result, run
from worker.read.study import read_study

ONE_SERIES = {"SeriesInstanceUID": uid(0, "pre"), "SeriesNumber": "4", "SeriesTime": "100500"}


# ------------------------------------------------------------------------------------------------ forms of a study


def _edited(pair: SyntheticPair, edit: Callable[[list[Dataset], list[Dataset]], object]) -> list[Dataset]:
    pre, low = list(pair.pre), list(pair.low)
    edit(pre, low)
    return [*pre, *low]


def _beside(pair: SyntheticPair, name: str, count: int = 1, **changes: Any) -> list[Dataset]:
    """The pair and a further series of `count` copies of the low-dose slices, told apart by their number."""
    more = []
    for copied in range(count):
        for k, dataset in enumerate(copy.deepcopy(pair.low)):
            dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid(0, name), uid(0, name, copied, k)
            dataset.SeriesNumber, dataset.TemporalPositionIdentifier = "20", str(copied + 1)
            for keyword, value in changes.items():
                setattr(dataset, keyword, value)
            more.append(dataset)
    return [*pair.all, *more]


def _without_scale_slope(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        dataset.remove_private_tags()


def _as_unknown_bytes(pair: SyntheticPair) -> list[Dataset]:
    """The private scale slope as a system leaves it that does not know its value representation."""
    for dataset in pair.all:
        element = dataset[0x2005, 0x100E]
        dataset.add_new(element.tag, "UN", np.float32(element.value).tobytes())
    return pair.all


def _scaled_slice_by_slice(pair: SyntheticPair) -> list[Dataset]:
    """Each slice with a scaling of its own, as Philips may write them."""
    for k, dataset in enumerate(pair.all):
        factor = 1 + 0.1 * (k % 7)
        stored = np.frombuffer(dataset.PixelData, "<u2") * factor
        dataset.PixelData = np.rint(stored).astype("<u2").tobytes()
        dataset[0x2005, 0x100E].value = float(np.float32(dataset[0x2005, 0x100E].value * factor))
        dataset.RescaleSlope = f"{float(dataset.RescaleSlope) * factor:.6g}"
    return pair.all


def _every_second_number(datasets: list[Dataset]) -> None:
    for k, dataset in enumerate(datasets):
        dataset.AcquisitionNumber = str(1 + k % 2)


FORMS: Mapping[str, Callable[[SyntheticPair], list[Dataset]]] = {
    "classic": lambda pair: pair.all,
    "enhanced": lambda pair: [as_enhanced(pair.pre), as_enhanced(pair.low)],
    "an Enhanced object for each slice": lambda pair: [as_enhanced([dataset]) for dataset in pair.all],
    "legacy": lambda pair: [as_legacy_converted(pair.pre), as_legacy_converted(pair.low)],
    "concatenated": lambda pair: [
        part for half in (pair.pre, pair.low) for part in as_concatenation(as_enhanced(half), 3)
    ],
    "concatenation without its end": lambda pair: [
        part for half in (pair.pre, pair.low) for part in as_concatenation(as_enhanced(half), 3)[:2]
    ],
    "two stacks": lambda pair: [as_stacks(as_enhanced(pair.pre), as_enhanced(pair.low))],
    "two stacks that say which has contrast": lambda pair: [_stacks_with_usage(pair)],
    "classic and enhanced": lambda pair: [*pair.pre, as_enhanced(pair.low)],
    "reversed": lambda pair: pair.all[::-1],
    "interleaved acquisitions": lambda pair: _edited(
        pair, lambda pre, low: (_every_second_number(pre), _every_second_number(low))
    ),
    "unknown private bytes": _as_unknown_bytes,
    "scaled slice by slice": _scaled_slice_by_slice,
    "scale slopes removed": lambda pair: _edited(
        pair, lambda pre, low: (_without_scale_slope(pre), _without_scale_slope(low))
    ),
    "one scale slope removed": lambda pair: _edited(pair, lambda pre, low: _without_scale_slope(low)),
    "localizer beside": lambda pair: [*pair.all, *make_localizer(pair)],
    "dynamic beside": lambda pair: _beside(pair, "dynamic", 6, RepetitionTime="5.1", InversionTime="", FlipAngle="25"),
    "second low dose": lambda pair: _beside(pair, "again"),
    "reformat beside": lambda pair: _beside(pair, "mpr", ImageType=["DERIVED", "SECONDARY", "MPR"]),
    "phase beside magnitude": lambda pair: [*pair.all, *_phase(pair.pre), *_phase(pair.low)],
    "pre alone": lambda pair: pair.pre,
    "gap": lambda pair: _edited(pair, lambda pre, low: pre.pop(5)),
    "short": lambda pair: _edited(pair, lambda pre, low: low.pop()),
    "position twice": lambda pair: _edited(
        pair, lambda pre, low: setattr(low[4], "ImagePositionPatient", low[3].ImagePositionPatient)
    ),
    "one slice turned": lambda pair: _edited(
        pair, lambda pre, low: setattr(low[4], "ImageOrientationPatient", ["0", "1", "0", "0", "0", "-1"])
    ),
    "unequal distances": lambda pair: _edited(
        pair, lambda pre, low: setattr(low[4], "ImagePositionPatient", ["-95.3", "-110.7", "-54.95"])
    ),
    "in colour": lambda pair: [_in_colour(dataset) for dataset in pair.all],
}


def _stacks_with_usage(pair: SyntheticPair) -> Dataset:
    """Both volumes in one object, low dose first; the agent was administered to the frames of stack 1 alone."""
    multi = as_stacks(as_enhanced(pair.low), as_enhanced(pair.pre))
    del multi.SharedFunctionalGroupsSequence[0].ContrastBolusUsageSequence
    for frame in multi.PerFrameFunctionalGroupsSequence:
        usage = Dataset()
        usage.ContrastBolusAgentNumber = 1
        usage.ContrastBolusAgentAdministered = "YES" if frame.FrameContentSequence[0].StackID == "1" else "NO"
        frame.ContrastBolusUsageSequence = [usage]
    return multi


def _phase(datasets: list[Dataset]) -> list[Dataset]:
    """Phase images of the same slices, in the series of the magnitude."""
    copies = copy.deepcopy(datasets)
    for k, dataset in enumerate(copies):
        dataset.SOPInstanceUID = uid(dataset.SeriesInstanceUID, "phase", k)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "P", "ND"]
        dataset.PixelData = bytes(len(dataset.PixelData))
    return copies


def _in_colour(dataset: Dataset) -> Dataset:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.PixelData = bytes(3 * len(dataset.PixelData))
    return dataset


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Row:
    """One study and what has to come of it."""

    name: str
    flavour: Mapping[str, Any] = field(default_factory=dict)
    form: str = "classic"
    syntax: UID = ExplicitVRLittleEndian
    reason: Reason | None = None  # None: it goes on to the preprocessing
    agent: str = "gadobutrol"
    dose_mmol_per_kg: float = 0.025
    field_strength_t: float = 3.0
    sequence: str = "MPRAGE"
    unit: str = "rescaled"
    tolerance: float = 0.5  # of a voxel against what was written, in the units of the phantom


def _words(pre: str, low: str) -> dict[str, str]:
    return {"pre_description": pre, "low_description": low}


def _both(**changes: Any) -> dict[str, Any]:
    return {"pre_changes": changes, "low_changes": changes}


SIEMENS_XA = {"vendor": "siemens", **_both(ManufacturerModelName="MAGNETOM Vida", SoftwareVersions="syngo MR XA50")}
GE = {"vendor": "ge", **_words("Ax 3D T1 BRAVO PRE", "Ax 3D T1 BRAVO POST")}
GE_FSPGR = {"vendor": "ge", "sequence": "SPGR", **_words("SAG 3D FSPGR", "SAG 3D FSPGR +C")}
PHILIPS = {"vendor": "philips", **_words("T1W_3D_TFE", "T1W_3D_TFE_KM")}
CANON = {"vendor": "canon", "sequence": "SPGR", **_words("3D T1 FE", "3D T1 FE CE")}

PHILIPS_TOLERANCE = 2.5  # its stored values are a quarter of the phantom's

VENDORS = [
    Row("Siemens MPRAGE, Gadovist in mL"),
    Row("Siemens MPRAGE, molarity in the text, decimal commas",
        {"agent": "Gadovist 1.0", "volume_ml": "2,0", "weight_kg": "80,0"}),
    Row("Siemens, total dose beside the volume", {"total_dose_ml": "2", "volume_ml": "2"}),
    Row("Siemens Avanto, agent with volume as text and volume 0",
        {"agent": "4,2 ml Omniscan", "volume_ml": "0", "weight_kg": "70", "field_strength_t": "1.4939999580383",
         **_both(ImagingFrequency="63.6", ManufacturerModelName="Avanto")},
        agent="gadodiamide", dose_mmol_per_kg=0.03, field_strength_t=1.5),
    Row("Siemens spin echo", {"sequence": "SE", **_words("t1_se_tra", "t1_se_tra_KM")}, sequence="SE"),
    Row("Siemens VIBE",
        {"sequence": "SPGR", **_words("t1_vibe_tra", "t1_vibe_tra_+c"), **_both(SequenceName="*fl3d1_ns")},
        sequence="SPGR"),
    Row("Siemens XA, Enhanced", SIEMENS_XA, form="enhanced"),
    Row("Siemens XA, Enhanced, words of the low dose alone", SIEMENS_XA | _words("T1", "T1 post contrast"), "enhanced"),
    Row("Siemens XA, Enhanced, one object for each slice", SIEMENS_XA, form="an Enhanced object for each slice"),
    Row("GE BRAVO, signed", GE | {"agent": "DOTAREM", "volume_ml": "4"}, agent="gadoterate"),
    Row("GE inversion-prepared FSPGR", GE_FSPGR | _both(InversionTime="450"), sequence="MPRAGE"),
    Row("GE FSPGR", GE_FSPGR, sequence="SPGR"),
    Row("GE, field strength in gauss", GE | {"field_strength_t": "30000"}),
    Row("GE, Enhanced", GE, form="enhanced"),
    Row("GE, Legacy Converted", GE, form="legacy"),
    Row("Philips TFE, private scaling", PHILIPS, unit="Philips FP", tolerance=PHILIPS_TOLERANCE),
    Row("Philips FFE", {"vendor": "philips", "sequence": "SPGR", **_words("T1W_FFE", "T1W_FFE_CE")},
        sequence="SPGR", unit="Philips FP", tolerance=PHILIPS_TOLERANCE),
    Row("Philips spin echo", {"vendor": "philips", "sequence": "SE", **_words("T1W_SE", "T1W_SE_GD")},
        sequence="SE", unit="Philips FP", tolerance=PHILIPS_TOLERANCE),
    Row("Philips, Enhanced", PHILIPS, form="enhanced", unit="Philips FP", tolerance=PHILIPS_TOLERANCE),
    Row("Philips, Legacy Converted", PHILIPS, form="legacy", unit="Philips FP", tolerance=PHILIPS_TOLERANCE),
    Row("Philips, Concatenation", PHILIPS | {"slices": 24}, form="concatenated", unit="Philips FP",
        tolerance=PHILIPS_TOLERANCE),
    Row("Philips, scale slope of unknown value representation", PHILIPS, "unknown private bytes", unit="Philips FP",
        tolerance=PHILIPS_TOLERANCE),
    Row("Philips, every slice with its own scaling", PHILIPS, "scaled slice by slice", unit="Philips FP", tolerance=5),
    Row("Philips, without private tags", PHILIPS, "scale slopes removed", tolerance=np.inf),  # the gain evens it out
    Row("Philips, private tags of one series removed", PHILIPS, form="one scale slope removed",
        reason=Reason.PAIR_NOT_COMPARABLE),
    Row("Canon field echo", CANON, sequence="SPGR"),
    Row("Canon, Enhanced", CANON, form="enhanced", sequence="SPGR"),
    Row("Canon at 1.5 T", CANON | {"field_strength_t": "1.5", **_both(ImagingFrequency="63.87")},
        sequence="SPGR", field_strength_t=1.5),
    Row("classic before, Enhanced after", form="classic and enhanced"),
]  # fmt: skip

SYNTAXES = [
    *(Row(f"Siemens, {syntax.name}", syntax=syntax) for syntax in TRANSFER_SYNTAXES[1:]
      if syntax not in (JPEGLSNearLossless, JPEG2000)),
    *(Row(f"GE signed, {syntax.name}", GE, syntax=syntax)
      for syntax in (RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless)),
    *(Row(f"Philips Enhanced, {syntax.name}", PHILIPS, "enhanced", syntax, unit="Philips FP",
          tolerance=PHILIPS_TOLERANCE)
      for syntax in (ImplicitVRLittleEndian, RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless)),
    Row("Canon, JPEG-LS near lossless", CANON, syntax=JPEGLSNearLossless, sequence="SPGR", tolerance=2),
    Row("Canon, JPEG 2000", CANON, syntax=JPEG2000, sequence="SPGR", tolerance=4),
]  # fmt: skip

GEOMETRY = [
    Row("sagittal", {"plane": "sagittal"}),
    Row("coronal, anisotropic", {"plane": "coronal", "spacing_mm": (0.9, 0.9, 1.5)}),
    Row("double oblique, GE", GE | {"plane": "oblique", "spacing_mm": (0.9, 1.1, 1.3)}),
    Row("double oblique, Philips, Enhanced", PHILIPS | {"plane": "oblique"}, form="enhanced", unit="Philips FP",
        tolerance=PHILIPS_TOLERANCE),
    Row("gapped spin echo", {"sequence": "SE", "spacing_mm": (0.6, 0.6, 5.5), "thickness_mm": 5.0,
                             **_words("t1_se", "t1_se_km")}, sequence="SE"),
    Row("gapped, the gap alone as SpacingBetweenSlices",
        {"spacing_mm": (0.6, 0.6, 5.5), "thickness_mm": 5.0, **_both(SpacingBetweenSlices="0.5")}),
    Row("overlapping slices", {"spacing_mm": (1.0, 1.0, 1.0), "thickness_mm": 2.0}),
    Row("slices in reverse", form="reversed"),
    Row("acquisition numbers interleaved in one volume", form="interleaved acquisitions"),
    Row("two acquisitions in one series", {"low_changes": {**ONE_SERIES, "AcquisitionNumber": "2"}}),
    Row("two temporal positions in one series",
        {"pre_changes": {"TemporalPositionIdentifier": "1"},
         "low_changes": {**ONE_SERIES, "TemporalPositionIdentifier": "2"}}),
    Row("two stacks of one Enhanced object", {"low_changes": ONE_SERIES, **_words("T1", "T1")}, form="two stacks",
        reason=Reason.AMBIGUOUS_SERIES),  # the contrast attributes of the object are those of both
    Row("two stacks of one Enhanced object, contrast stated by frame",
        {"low_changes": ONE_SERIES, **_words("T1", "T1")}, form="two stacks that say which has contrast"),
    Row("a localizer beside", form="localizer beside"),
    Row("a dynamic series beside", form="dynamic beside"),
    Row("magnitude and phase in each series", form="phase beside magnitude"),
    Row("a reformat beside", form="reformat beside"),
    Row("inner slice missing", form="gap", reason=Reason.MISSING_SLICES),
    Row("last slice missing", form="short", reason=Reason.MISSING_SLICES),
    Row("last part of a concatenation missing", {"slices": 24}, form="concatenation without its end",
        reason=Reason.MISSING_SLICES),
    Row("two slices at one position", form="position twice", reason=Reason.IRREGULAR_GEOMETRY),
    Row("one slice turned", form="one slice turned", reason=Reason.IRREGULAR_GEOMETRY),
    Row("unequal distances", form="unequal distances", reason=Reason.IRREGULAR_GEOMETRY),
    Row("both volumes in one series, nothing to tell them apart", {"low_changes": ONE_SERIES},
        reason=Reason.ONE_SERIES_ONLY),
]  # fmt: skip

# Agent as written, mL and kg, and the dose that follows. The code of the agent stands in the Enhanced half of them.
_AGENTS_WRITTEN = {
    "gadobutrol": ("GADAVIST", "3", "75", 0.04),
    "gadoterate": ("CLARISCAN", "5", "100", 0.025),
    "gadoteridol": ("ProHance", "4.2", "70", 0.03),
    "gadopentetate": ("MAGNEVIST", "4.95", "75", 0.033),
    "gadobenate": ("MULTIHANCE", "3", "60", 0.025),
    "gadodiamide": ("Omniscan", "6", "75", 0.04),
    "gadoversetamide": ("OptiMARK", "3", "50", 0.03),
    "gadoxetate": ("PRIMOVIST", "2", "50", 0.01),
    "gadopiclenol": ("Vueway", "2.0", "80", 0.0125),
}


def _agent_rows() -> Iterator[Row]:
    flavours = [{}, GE, PHILIPS, CANON]
    for index, agent in enumerate(AGENTS):
        text, volume_ml, weight_kg, dose = _AGENTS_WRITTEN[agent.name]
        chosen = flavours[index % 4]
        written = chosen | {"agent": text, "volume_ml": volume_ml, "weight_kg": weight_kg}
        code = (agent.sct_code, "SCT", agent.sct_meaning) if agent.sct_code else ("X1", "99LOCAL", "Gadopiclenol")
        for form, more in (("classic", {}), ("enhanced", {"agent_code": code})):
            yield Row(
                f"{agent.name}, {form}",
                written | more,
                form,
                agent=agent.name,
                dose_mmol_per_kg=dose,
                sequence="SPGR" if chosen is CANON else "MPRAGE",
                unit="Philips FP" if chosen is PHILIPS else "rescaled",
                tolerance=PHILIPS_TOLERANCE if chosen is PHILIPS else 0.5,
            )


YAMADA = {"charset": ["", "ISO 2022 IR 87"], "patient_name": "Yamada^Tarou=山田^太郎=やまだ^たろう"}
CHARACTER_SETS = [
    Row("Latin-1", {"charset": "ISO_IR 100", "patient_name": "Grüße^Jörg", "low_description": "t1 für Schädel KM"}),
    Row("UTF-8",
        GE | {"charset": "ISO_IR 192", "patient_name": "Ångström^Zoë=王^小東", "agent": "Gadovist 注射"}),
    Row("Japanese, three scripts", CANON | YAMADA | {"low_description": "頭部 3D T1 造影 CE"}, sequence="SPGR"),
    Row("Japanese, Enhanced", YAMADA, "enhanced"),
    Row("Japanese, half-width katakana",
        CANON | {"charset": ["ISO 2022 IR 13", "ISO 2022 IR 87"], "patient_name": "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"},
        sequence="SPGR"),
    Row("Korean", {"charset": ["", "ISO 2022 IR 149"], "patient_name": "Hong^Gildong=洪^吉洞=홍^길동"}),
    Row("Chinese", {"charset": "GB18030", "patient_name": "Wang^XiaoDong=王^小东"}),
    Row("Cyrillic, Legacy Converted", {"charset": "ISO_IR 144", "patient_name": "\u041b\u044e\u043a\u0441^"}, "legacy"),
]  # fmt: skip

REFUSED = [
    Row("agent CE", {"agent": "CE"}, reason=Reason.UNKNOWN_AGENT),
    Row("agent YES", GE | {"agent": "YES"}, reason=Reason.UNKNOWN_AGENT),
    Row("agent KM", {"agent": "KM"}, reason=Reason.UNKNOWN_AGENT),
    Row("agent as volume alone", PHILIPS | {"agent": "8 ml"}, reason=Reason.UNKNOWN_AGENT),
    Row("two agents", {"agent": "Gadovist/Dotarem"}, reason=Reason.UNKNOWN_AGENT),
    Row("no weight", {"weight_kg": None}, reason=Reason.UNKNOWN_DOSE),
    Row("no volume", CANON | {"volume_ml": None}, reason=Reason.UNKNOWN_DOSE),
    Row("volume 0", {"volume_ml": "0"}, reason=Reason.UNKNOWN_DOSE),
    Row("no field strength", {"field_strength_t": None}, reason=Reason.UNKNOWN_FIELD_STRENGTH),
    Row("field strength against the frequency", GE | _both(ImagingFrequency="63.9"),
        reason=Reason.UNKNOWN_FIELD_STRENGTH),
    Row("standard dose in the text", {"agent": "GADOVIST 7,5ML", "volume_ml": None}, reason=Reason.STANDARD_DOSE),
    Row("standard dose of gadopiclenol", {"agent": "Vueway", "volume_ml": "8"}, reason=Reason.STANDARD_DOSE),
    Row("no contrast attributes and no words", {"agent": None, **_words("T1", "T1")}, reason=Reason.AMBIGUOUS_SERIES),
    Row("words against the order of times", _words("T1 POST", "T1 PRE"), reason=Reason.AMBIGUOUS_SERIES),
    Row("two series after contrast", form="second low dose", reason=Reason.AMBIGUOUS_SERIES),
    Row("pre-contrast alone", form="pre alone", reason=Reason.ONE_SERIES_ONLY),
    Row("another flip angle", {"low_changes": {"FlipAngle": "25"}}, reason=Reason.PAIR_NOT_COMPARABLE),
    Row("another matrix spacing", {"low_changes": {"PixelSpacing": ["0.5", "0.5"]}}, reason=Reason.PAIR_NOT_COMPARABLE),
    Row("negative rescale slope", {"low_changes": {"RescaleSlope": "-1", "RescaleIntercept": "0"}},
        reason=Reason.UNSUPPORTED_OBJECT),
    Row("in colour", form="in colour", reason=Reason.UNSUPPORTED_OBJECT),
    Row("another patient", {"low_changes": {"PatientID": "SOMEBODYELSE"}}, reason=Reason.TWO_PATIENTS),
    Row("another study", {"low_changes": {"StudyInstanceUID": uid("another study")}}, reason=Reason.TWO_STUDIES),
    Row("synthetic", _both(SyntheticData="YES"), reason=Reason.OWN_OUTPUT),
]  # fmt: skip

MATRIX = [*VENDORS, *SYNTAXES, *GEOMETRY, *_agent_rows(), *CHARACTER_SETS, *REFUSED]
SMALL = {"slices": 9, "rows": 32, "columns": 36}


def written(row: Row, folder: Path) -> list[Path]:
    folder.mkdir()
    paths = []
    for n, dataset in enumerate(FORMS[row.form](make_pair(**(SMALL | row.flavour)))):
        paths.append(folder / f"IM{n:04}")
        paths[-1].write_bytes(encode(dataset, implicit=row.syntax == ImplicitVRLittleEndian))
        if row.syntax.is_compressed:
            compress_file(paths[-1], row.syntax)
    return paths


def acquired(paths: list[Path]) -> tuple[Pair, Acquisition]:
    pair = choose_pair(read_study(paths))
    acquisition = read_acquisition(pair)
    check_acquisition(acquisition)
    return pair, acquisition


def test_the_matrix_holds_every_vendor_form_transfer_syntax_and_agent() -> None:
    assert len(MATRIX) >= 40
    assert len({row.name for row in MATRIX}) == len(MATRIX)
    assert {row.syntax for row in MATRIX} == set(TRANSFER_SYNTAXES)
    assert {row.agent for row in MATRIX} == {agent.name for agent in AGENTS}
    assert {row.flavour.get("vendor", "siemens") for row in MATRIX} == {"siemens", "ge", "philips", "canon"}
    assert {row.form for row in MATRIX} == set(FORMS)


@pytest.mark.parametrize("row", MATRIX, ids=lambda row: row.name)
def test_a_study_ends_as_the_table_says(tmp_path: Path, row: Row) -> None:
    paths = written(row, tmp_path / "in")
    if row.reason:
        with pytest.raises(Permanent) as refused:
            acquired(paths)
        assert refused.value.reason is row.reason
        return
    pair, found = acquired(paths)
    assert [str(one.header.AcquisitionTime)[:6] for one in (pair.pre, pair.low)] == ["100500", "101500"]
    assert (found.agent.value, found.sequence.value) == (row.agent, row.sequence)
    assert found.dose_mmol_per_kg.value == pytest.approx(row.dose_mmol_per_kg, rel=0.002)
    assert found.field_strength_t.value == pytest.approx(row.field_strength_t, abs=0.0005)
    spacing_mm = row.flavour.get("spacing_mm", (1.0, 1.0, 1.2))
    for series, voxels in zip((pair.pre, pair.low), truth(row.flavour.get("slices", SMALL["slices"])), strict=True):
        volume = series.volume()
        assert series.unit == row.unit
        assert volume.spacing_mm == pytest.approx(spacing_mm, abs=1e-6)
        assert np.abs(volume.voxels - voxels).max() <= row.tolerance
    keeps_its_text(pair)


@cache
def truth(slices: int) -> list[np.ndarray]:
    """The voxels (k, j, i) of the phantom that every flavour shows, as plain unsigned integers."""
    plain = make_pair(**(SMALL | {"slices": slices}))
    series = (b"".join(dataset.PixelData for dataset in one) for one in (plain.pre, plain.low))
    return [
        np.frombuffer(pixels, "<u2").reshape(slices, SMALL["rows"], SMALL["columns"]).astype(float) for pixels in series
    ]


def keeps_its_text(pair: Pair) -> None:
    """Name and character set of both results are, byte by byte, those of the image that the signal was added to."""
    context = DerivationContext(
        model_id="matrix",
        model_version="0",
        model_sha256="00" * 32,
        card_sha256=None,
        notice="research use",
        config_hash="00" * 32,
        agent=None,
        administered_dose_mmol_per_kg=None,
        simulated_dose_mmol_per_kg=None,
        software_version="0",
        now=datetime(2031, 5, 4, tzinfo=UTC),
    )
    for kind, source, other in ((Kind.SD, pair.pre, pair.low), (Kind.SD_PLUS, pair.low, pair.pre)):
        nothing = np.zeros((len(source.planes), *source.planes[0].stored.shape), dtype=np.float32)
        image = next(iter(derive(kind, source, nothing, other, context)))
        path = source.planes[0].pixels.path.with_suffix(f".{kind.value}")
        image.save_as(path, enforce_file_format=True)
        result, original = dcmread(path), dcmread(source.planes[0].pixels.path)
        for keyword in ("SpecificCharacterSet", "PatientName", "StudyDescription"):
            assert result.get_item(keyword).value == original.get_item(keyword).value
        assert list(result.ImagePositionPatient) == list(source.header.ImagePositionPatient)


# ------------------------------------------------------------------------------------------------ end to end


@dataclass(frozen=True)
class _EndToEnd:
    """The same simulated head as one vendor would send it, from files to derived series."""

    name: str
    flavour: Mapping[str, Any]
    form: str = "classic"
    syntax: UID = ExplicitVRLittleEndian


END_TO_END = [
    _EndToEnd("GE sagittal, signed, JPEG Lossless", GE | {"plane": "sagittal"}, syntax=JPEGLosslessSV1),
    _EndToEnd("Philips Enhanced, RLE, Japanese", PHILIPS | YAMADA, "enhanced", RLELossless),
]


LEVEL = 800.0  # of white matter, in the units of the images


def signal_of(study: _EndToEnd, folder: Path) -> tuple[np.ndarray, Result]:
    """What the linear engine adds to the pre-contrast image (k, j, i), axial whatever the study was, and the result."""
    volumes = [voxels * LEVEL for voxels in (head(stripped=True).pre, head(stripped=True).low)]
    if study.flavour.get("plane") == "sagittal":  # slices towards -x, rows towards -z
        volumes = [np.transpose(voxels[::-1, :, ::-1], (2, 0, 1)) for voxels in volumes]
    asked = {"volumes": tuple(volumes), "spacing_mm": (2.0, 2.0, 2.0), "volume_ml": "2.667"}  # a third of 0.1 mmol/kg
    paths = written(Row(study.name, study.flavour | asked, study.form, study.syntax), folder)
    result = run(paths, JobOptions(), LinearEngine(), lambda *_: None, outputs=Outputs(watermark=False))
    pre = read_study(paths).series[0]
    stored = np.stack([plane.stored for plane in pre.planes])
    added = np.stack([image.pixel_array for image in result.series["sd"]]) - stored.astype(float)
    signal = added * pre.planes[0].unit_per_stored
    return (signal.transpose(1, 2, 0)[::-1, :, ::-1] if study.flavour.get("plane") == "sagittal" else signal), result


@pytest.mark.parametrize("study", END_TO_END, ids=lambda study: study.name)
def test_a_head_ends_in_the_same_signal_whichever_vendor_sends_it(tmp_path: Path, study: _EndToEnd) -> None:
    signal, result = signal_of(study, tmp_path / "in")
    prepared = prepared_head(stripped=True)
    arrays = prepared.signal_on_pre(LinearEngine().predict(prepared, conditions(1 / 30))) * LEVEL
    assert arrays.max() > 500
    assert np.corrcoef(signal.ravel(), arrays.ravel())[0, 1] > 0.995
    assert signal.sum() == pytest.approx(arrays.sum(), rel=0.01)
    assert result.report["outcome"] == "DONE"
    assert result.report["acquisition"]["dose_mmol_per_kg"]["value"] == pytest.approx(1 / 30, rel=0.001)
    for images in result.series.values():
        assert images[0].PatientName == study.flavour.get("patient_name", "Phantom^Test")
        assert images[0].SpecificCharacterSet == study.flavour.get("charset", "ISO_IR 100")
        assert images[0].ContrastBolusVolume == pytest.approx(2.667)
