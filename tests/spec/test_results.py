"""Every kind of result against the standard and against each other: dciodvfy, dcentvfy, and what the objects say."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset

from models.preprocess import Comparison, Prepared
from models.quality import LIMITS
from service.core.dicom.header import is_synthetic
from service.core.errors import Permanent, Reason
from service.core.job import Kind
from tests.factories import as_enhanced, encode, make_pair, write_study
from tests.spec.test_derived import CONTEXT, errors_of, inconsistencies, needs_dicom3tools, paired, saved
from worker.choose.acquisition import read_acquisition
from worker.choose.pairing import Pair, choose_pair
from worker.compose.derived import MR_SERIES
from worker.compose.results import STORED_AS, Findings, Outputs, compose
from worker.pipeline import refuse
from worker.read.study import read_study

REPORT = {
    "acquisition": {
        "field_strength_t": {"value": 3.0, "source": "tag (0018,0087)"},
        "agent": {"value": "gadobutrol", "source": "free text"},
        "dose_mmol_per_kg": {"value": 0.025, "source": "2 mL of 1 mmol/mL in 80 kg"},
        "weight_kg": {"value": None, "source": "unknown: missing"},
    },
    "quality": [
        {"name": "pair_correlation", "value": 0.91, "unit": "1", "verdict": "pass", "reason": "likeness of the pair"},
        {"name": "residual_motion", "value": 0.3, "unit": "mm", "verdict": "pass", "reason": "what was undone"},
        {"name": "noise", "value": 0.2, "unit": "1", "verdict": "warn", "reason": "noise of the subtraction"},
    ],
    "series": {"witnesses": ["the agent stands in series 9"], "set_aside": ["series 1: localizer"]},
}
ALL = Outputs(kinds=tuple(Kind), watermark=False)
# dicom3tools of 2022 has Accession Number in the series of images and in the study of reports; the values are equal.
KNOWN_INCONSISTENCY = "Warning - Different information entities for attribute - Element=<AccessionNumber> "


def findings_of(pair: Pair, signal: np.ndarray | None = None, **changes: Any) -> Findings:
    """What a job finds whose working grid is the pre-contrast grid, and whose white matter has the value 500."""
    volume = pair.pre.volume()
    if signal is None:
        signal = np.zeros(volume.voxels.shape, np.float32)
        signal[2:6, 8:14, 6:12] = np.linspace(0.02, 1.4, 4 * 6 * 6, dtype=np.float32).reshape(4, 6, 6)
    ones = np.ones(volume.voxels.shape, np.float32)
    comparison = Comparison(ones, 1.0, ones, 0.01, ones, (0.35, 0.25, 0.15), np.zeros((3, *ones.shape), np.float32))
    prepared = Prepared(
        pre=volume.with_voxels(volume.voxels / 500),
        brain=ones > 0,
        found={},
        support=ones,
        comparison=comparison,
        scale=500.0,
        low_scale=500.0,
        pre_to_low=sitk.Euler3DTransform(),
        native_pre=volume,
        native_low=pair.low.volume(),
    )
    return Findings(pair, prepared, signal, REPORT, dataclasses.replace(CONTEXT, **changes))


def enhanced(folder: Path) -> tuple[list[Path], Pair]:
    folder.mkdir()
    pair, paths = make_pair(plane="oblique"), [folder / "pre.dcm", folder / "low.dcm"]
    for path, series in zip(paths, (pair.pre, pair.low), strict=True):
        path.write_bytes(encode(as_enhanced(series)))
    return paths, choose_pair(read_study(paths))


def written(folder: Path, made: dict[str, list[Dataset]]) -> dict[Kind, list[Dataset]]:
    """As they are read from disk."""
    return {Kind(name): [dcmread(path) for path in saved(folder / name, found)] for name, found in made.items()}


# ------------------------------------------------------------------------------------------------ the validators


@needs_dicom3tools
@pytest.mark.parametrize("source", ["siemens", "ge", "philips", "sparse", "japanese", "enhanced"])
def test_every_kind_is_valid_and_consistent_with_the_sources(tmp_path: Path, source: str) -> None:
    gone = dict.fromkeys(["SliceThickness", "BodyPartExamined", "StudyDescription"])
    gone |= dict.fromkeys(["PatientSex", "PatientBirthDate", "StudyTime", "AccessionNumber"], "")
    studies: dict[str, dict[str, Any]] = {
        "sparse": {"pre_changes": gone, "low_changes": gone},
        "japanese": {"charset": ["", "ISO 2022 IR 87"], "patient_name": "Yamada^Tarou=山田^太郎"},
    }
    if source == "enhanced":
        paths, pair = enhanced(tmp_path / "in")
    else:
        options = studies.get(source, {"vendor": source, "plane": "oblique"})
        paths = write_study(tmp_path / "in", **options)
        pair = choose_pair(read_study(paths))
    made = compose(findings_of(pair), ALL)
    files = {name: saved(tmp_path / name, found) for name, found in made.items()}
    assert list(made) == [kind.value for kind in Kind]
    for name, found in files.items():
        step = 4 if Kind(name) in MR_SERIES else 1
        assert [error for path in found[::step] for error in errors_of(path)] == [], name
    lines = inconsistencies([*paths, *itertools.chain(*files.values())]).splitlines()
    if source != "enhanced":  # classic and Enhanced MR differ in what they hold
        assert [line for line in lines if not line.startswith(KNOWN_INCONSISTENCY)] == []
    assert all("structured_report" in line for line in lines if line.startswith(KNOWN_INCONSISTENCY))


@needs_dicom3tools
def test_a_signal_of_nothing_gives_valid_objects_too(tmp_path: Path) -> None:
    pair = paired(tmp_path / "in")
    made = compose(findings_of(pair, np.zeros((8, 24, 20), np.float32)), ALL)
    for name, found in made.items():
        for path in saved(tmp_path / name, found)[::4]:
            assert errors_of(path) == []
    assert not made["segmentation"][0].pixel_array.any()
    assert not made["parametric_map"][0].pixel_array.any()


@pytest.mark.filterwarnings("ignore:Failed to decode byte string")
def test_text_that_is_not_in_its_character_set_keeps_its_bytes_in_every_kind(tmp_path: Path) -> None:
    """Latin-1 under a header that says UTF-8, as systems in between make it: a replaced letter is another patient."""
    keywords = ("PatientID", "AccessionNumber", "StudyID", "StudyDescription", "ReferringPhysicianName")
    latin = dict.fromkeys((*keywords, "InstitutionName"), "Grüße")
    agent = {"ContrastBolusAgent": "Gadovist für Jörg"}
    paths = write_study(tmp_path / "in", patient_name="Grüße^Jörg", pre_changes=latin, low_changes=latin | agent)
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 192"))
    pair = choose_pair(read_study(paths))
    assert read_acquisition(pair).agent.value == "gadobutrol"
    originals = dcmread(paths[0]), dcmread(paths[-1])
    for kind, found in written(tmp_path, compose(findings_of(pair), ALL)).items():
        own, low = originals[kind is Kind.SD_PLUS], originals[1]
        for keyword in ("PatientName", *keywords):
            assert found[0].get_item(keyword).value == own.get_item(keyword).value, (kind, keyword)
        scanner = found[0].ContributingEquipmentSequence[0]
        assert scanner.get_item("InstitutionName").value == own.get_item("InstitutionName").value
        if kind in MR_SERIES:
            assert found[0].get_item("ContrastBolusAgent").value == low.get_item("ContrastBolusAgent").value


# ------------------------------------------------------------------------------------------------ what they show


def test_all_kinds_show_the_same_signal(tmp_path: Path) -> None:
    findings = findings_of(paired(tmp_path / "in", plane="oblique"))
    made = written(tmp_path, compose(findings, ALL))
    sources = [plane.stored.astype(int) for plane in findings.pair.pre.planes]
    alone = np.stack([image.pixel_array for image in made[Kind.SUBTRACTION]]).astype(int)
    sums = np.stack([image.pixel_array for image in made[Kind.SD]]).astype(int)
    assert np.array_equal(sums, np.stack(sources) + alone)
    assert np.array_equal(alone, np.rint(findings.signal * 500))
    assert np.allclose(volume_of(made[Kind.PARAMETRIC_MAP][0], (8, 24, 20)), findings.signal, atol=1e-6)
    assert np.array_equal(volume_of(made[Kind.SEGMENTATION][0], (8, 24, 20)) > 0, findings.signal > 0.1)


def volume_of(image: Dataset, shape: tuple[int, ...]) -> np.ndarray:
    """(k, j, i) in the order of InstanceNumber of the MR series; frames that were left out are 0."""
    pixels = image.pixel_array.reshape(-1, *shape[1:])
    frames = image.PerFrameFunctionalGroupsSequence
    heights = {height_of(image, frame): n for n, frame in enumerate(frames)}
    step, first = 1.2, min(heights)
    volume = np.zeros(shape, pixels.dtype)
    lowest = {"Parametric Map Storage": 0, "Segmentation Storage": 2}[image.SOPClassUID.name]
    for height, n in heights.items():
        volume[lowest + round((height - first) / step)] = pixels[n]
    return volume


def height_of(image: Dataset, frame: Dataset) -> float:
    groups = image.SharedFunctionalGroupsSequence[0]
    cosines = [float(value) for value in groups.PlaneOrientationSequence[0].ImageOrientationPatient]
    position = [float(value) for value in frame.PlanePositionSequence[0].ImagePositionPatient]
    return float(np.cross(cosines[:3], cosines[3:]) @ position)


def test_frames_name_their_slice_and_its_partner(tmp_path: Path) -> None:
    for name, paths_and_pair in {"classic": None, "enhanced": enhanced(tmp_path / "enhanced")}.items():
        pair = paths_and_pair[1] if paths_and_pair else paired(tmp_path / name)
        made = compose(findings_of(pair), ALL)
        for image in (made["parametric_map"][0], made["segmentation"][0]):
            for frame in image.PerFrameFunctionalGroupsSequence:
                own, partner = frame.DerivationImageSequence[0].SourceImageSequence
                position = [float(value) for value in frame.PlanePositionSequence[0].ImagePositionPatient]
                [k] = [
                    k
                    for k, plane in enumerate(pair.pre.planes)
                    if np.allclose([float(value) for value in plane.header.ImagePositionPatient], position, atol=1e-4)
                ]
                for item, series in ((own, pair.pre), (partner, pair.low)):
                    assert item.ReferencedSOPInstanceUID == series.planes[k].sop_instance_uid
                    assert item.get("ReferencedFrameNumber") == series.planes[k].frame_number
                assert (own.SpatialLocationsPreserved, partner.SpatialLocationsPreserved) == ("YES", "NO")


def test_the_segmentation_names_the_model_its_version_and_the_threshold(tmp_path: Path) -> None:
    findings = findings_of(paired(tmp_path))
    outputs = dataclasses.replace(ALL, threshold=0.25)
    segment = compose(findings, outputs)["segmentation"][0].SegmentSequence[0]
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("test-model", "7")
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeMeaning == "Artificial Intelligence"
    assert "0.25" in segment.SegmentLabel
    assert "threshold=0.25" in algorithm.AlgorithmParameters.replace('"', "")
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    linear = compose(findings_of(paired(tmp_path), model_id="linear"), ALL)["segmentation"][0].SegmentSequence[0]
    family = linear.SegmentationAlgorithmIdentificationSequence[0].AlgorithmFamilyCodeSequence[0]
    assert family.CodeMeaning == "Adaptive Filtering"


def test_a_presentation_state_says_synthetic_over_every_image_of_every_series(tmp_path: Path) -> None:
    made = compose(findings_of(paired(tmp_path)), ALL)
    states = made["presentation_state"]
    for kind, state in zip(MR_SERIES, states, strict=True):
        [annotation] = state.GraphicAnnotationSequence
        shown = {item.ReferencedSOPInstanceUID for item in annotation.ReferencedImageSequence}
        assert shown == {image.SOPInstanceUID for image in made[kind.value]}
        assert "SYNTHETIC - NOT ACQUIRED" in annotation.TextObjectSequence[0].UnformattedTextValue
    assert len({state.SeriesInstanceUID for state in states}) == 1
    assert [state.InstanceNumber for state in states] == [1, 2, 3]


def test_a_presentation_state_keeps_the_shape_of_a_head_whose_pixels_are_not_square(tmp_path: Path) -> None:
    pair = paired(tmp_path, pre_changes={"PixelSpacing": [1.0, 1.5]}, low_changes={"PixelSpacing": [1.0, 1.5]})
    for state in compose(findings_of(pair), ALL)["presentation_state"]:
        for area in state.DisplayedAreaSelectionSequence:
            assert "PresentationPixelAspectRatio" not in area
            assert list(area.PresentationPixelSpacing) == [1.0, 1.5]


# ------------------------------------------------------------------------------------------------ the report


def items_of(content: Any) -> Iterator[Dataset]:
    for item in content:
        yield item
        yield from items_of(item.get("ContentSequence", ()))


def test_the_report_says_what_is_known_from_where_and_gives_no_number_for_what_is_not(tmp_path: Path) -> None:
    [report] = compose(findings_of(paired(tmp_path)), ALL)["structured_report"]
    parsed = highdicom.sr.ComprehensiveSR.from_dataset(report)
    assert isinstance(parsed.content, highdicom.sr.MeasurementReport)
    items = list(items_of(report.ContentSequence))
    numbers = {
        item.ConceptNameCodeSequence[0].CodeMeaning: (
            float(item.MeasuredValueSequence[0].NumericValue),
            item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue,
        )
        for item in items
        if item.ValueType == "NUM"
    }
    assert numbers["Magnetic field strength"] == (3.0, "T")
    assert numbers["Dose"] == (0.025, "mmol/kg")
    assert numbers["Simulated dose"] == (0.1, "mmol/kg")
    assert numbers["Pair correlation"] == (0.91, "1")
    assert numbers["Residual motion"] == (0.3, "mm")
    assert "Body weight" not in numbers
    voxels = int((findings_of(paired(tmp_path)).signal > 0.1).sum())
    assert numbers["Volume"][0] == pytest.approx(voxels * 1.2e-3, abs=1e-3)
    texts = " | ".join(item.TextValue for item in items if item.ValueType == "TEXT")
    for said in (
        "tag (0018,0087)", "gadobutrol (free text)", "unknown: missing", "not a medical device", "ab" * 32, "ef" * 32,
        "the agent stands in series 9", "series 1: localizer", "what was undone", "this dose was not injected",
    ):  # fmt: skip
        assert said in texts
    verdicts = [item.ConceptCodeSequence[0].CodeValue for item in items if item.ValueType == "CODE"]
    assert {"PASS", "WARN"} <= set(verdicts)


def test_the_report_has_both_series_as_evidence(tmp_path: Path) -> None:
    pair = paired(tmp_path)
    [report] = compose(findings_of(pair), ALL)["structured_report"]
    [study] = report.PertinentOtherEvidenceSequence
    named = {item.ReferencedSOPInstanceUID for series in study.ReferencedSeriesSequence
             for item in series.ReferencedSOPSequence}  # fmt: skip
    assert named == {plane.sop_instance_uid for series in (pair.pre, pair.low) for plane in series.planes}


# ------------------------------------------------------------------------------------------------ identity and marks


def test_all_uids_follow_from_the_input_and_none_is_shared_by_two_inputs_models_or_settings(tmp_path: Path) -> None:
    def uids(folder: Path, **changes: Any) -> set[str]:
        findings = findings_of(paired(folder, **changes.pop("study", {})), **changes)
        made = itertools.chain(*compose(findings, ALL).values())
        return {str(element.value) for one in made for element in one.iterall() if element.VR == "UI"}

    def own(found: set[str]) -> set[str]:
        return {uid for uid in found if uid.startswith("2.25.")} - inputs

    pair = paired(tmp_path / "a")
    inputs = {plane.sop_instance_uid for series in (pair.pre, pair.low) for plane in series.planes}
    inputs |= {pair.pre.series_uid, pair.low.series_uid, str(pair.pre.header.StudyInstanceUID)}
    inputs |= {str(pair.pre.header.FrameOfReferenceUID), CONTEXT_CREATOR}
    first = own(uids(tmp_path / "a"))
    assert own(uids(tmp_path / "a")) == first
    assert len(first) == 3 * 8 + 3 + 1 + 1 + 1 + 7 + 2 + 1 + 3  # instances, series, dimensions, segment, groups
    for other in ({"config_hash": "00" * 16}, {"model_sha256": "00" * 32}, {"study": {"slices": 9}}):
        assert not own(uids(tmp_path / str(len(str(other))), **other)) & first


CONTEXT_CREATOR = "2.25.129812984864173981408840055848352892878"  # InstanceCreatorUID


def test_series_numbers_tell_kinds_and_engines_apart(tmp_path: Path) -> None:
    numbers = [
        found[0].SeriesNumber
        for model in ("test-model", "linear")
        for found in compose(findings_of(paired(tmp_path), model_id=model), ALL).values()
    ]
    assert numbers == [*range(9001, 9008), *range(9011, 9018)]


def test_a_result_of_the_linear_engine_does_not_call_itself_ai(tmp_path: Path) -> None:
    for found in compose(findings_of(paired(tmp_path), model_id="linear"), ALL).values():
        assert found[0].SeriesDescription.startswith("LINEAR SYNTH")
        assert "AI_SYNTH" not in found[0].get("ImageType", [])


def test_every_object_is_marked_as_ours_and_says_what_it_is(tmp_path: Path) -> None:
    for name, found in compose(findings_of(paired(tmp_path)), ALL).items():
        for one in found:
            assert one.SOPClassUID == one.file_meta.MediaStorageSOPClassUID == STORED_AS[Kind(name)]
            assert is_synthetic(one)
            assert (one.SyntheticData, one.ContentQualification) == ("YES", "RESEARCH")
            assert "NOT ACQUIRED" in one.SeriesDescription
            assert one.InstanceCreationDate == "20310504"
            assert one.private_block(0x4C47, "LOWGAD SYNTHCE 1")[0x04].value == Kind(name).name
            assert one.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"


def test_only_what_is_wanted_is_made(tmp_path: Path) -> None:
    findings = findings_of(paired(tmp_path))
    for kind in set(Kind) - {Kind.PRESENTATION_STATE}:
        assert list(compose(findings, Outputs((kind,)))) == [kind.value]


# ------------------------------------------------------------------------------------------------ the watermark


def test_the_watermark_stands_outside_the_head_and_the_image_keeps_the_digest_without_it(tmp_path: Path) -> None:
    findings = findings_of(paired(tmp_path, rows=256, columns=256), np.zeros((8, 256, 256), np.float32))
    findings.signal[4, 120, 120] = 0.5
    plain = compose(findings, dataclasses.replace(ALL, watermark=False))
    marked = compose(findings, dataclasses.replace(ALL, watermark=True))
    for kind in MR_SERIES:
        for without, image in zip(plain[kind.value], marked[kind.value], strict=True):
            differs = without.pixel_array != image.pixel_array
            assert differs.any()
            assert (image.pixel_array >= without.pixel_array).all()
            assert not differs[head_of(findings)].any()
            assert "SYNTHETIC" in image.DerivationDescription
            assert "burned in" not in without.DerivationDescription
            digests = [one.private_block(0x4C47, "LOWGAD SYNTHCE 1")[0x07].value for one in (without, image)]
            assert digests[0] == digests[1]
            assert image.BurnedInAnnotation == "NO"


def head_of(findings: Findings) -> np.ndarray:
    """(row, column): what is brighter than a tenth of the brightest tissue in any slice."""
    voxels = findings.pair.pre.volume().voxels
    return np.asarray((voxels > 0.15 * np.quantile(voxels, 0.99)).any(axis=0))


def test_an_image_without_room_for_the_watermark_says_so(tmp_path: Path) -> None:
    findings = findings_of(paired(tmp_path))
    image = compose(findings, Outputs())["sd"][0]
    plain = compose(findings, Outputs(watermark=False))["sd"][0]
    assert np.array_equal(image.pixel_array, plain.pixel_array)
    assert "No room for the watermark in 8 of 8 images" in image.DerivationDescription


def test_a_study_that_the_gate_stops_keeps_every_figure_in_its_report() -> None:
    figures = (LIMITS["noise"].judge("noise", 0.02), LIMITS["pair_correlation"].judge("pair_correlation", 0.6))
    with pytest.raises(Permanent) as stopped:
        refuse(figures)
    assert stopped.value.reason is Reason.PAIR_NOT_COMPARABLE
    assert "pair_correlation is 0.6 (" in stopped.value.detail
    rows = [(row["name"], row["value"], row["unit"], row["verdict"]) for row in stopped.value.report["quality"]]
    assert rows == [("noise", 0.02, "1", "pass"), ("pair_correlation", 0.6, "1", "refuse")]
