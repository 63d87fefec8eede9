"""Synthetic studies for tests: a T1 pre-contrast and a low-dose series as pydicom datasets, small and quick to make.

Hides what a scanner writes. The healthy studies are clean under `dciodvfy -new`; odd cases are asked for by name, and
anything else by editing the datasets that `make_pair` returns (plain pydicom datasets, one per slice). The same
arguments always give the same bytes. Must never hold real patient data.

    pair = make_pair(agent="Dotarem", volume_ml="4", plane="sagittal")        # datasets: pair.pre, pair.low
    write_study(tmp_path, vendor="philips", odd=["localizer"])                # files on disk, one folder
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import compress
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSNearLossless,
    MRImageStorage,
)
from pydicom.valuerep import format_number_as_ds

ODD_CASES = frozenset(
    {
        "gap_in_pre",  # one inner slice of the pre-contrast series is missing
        "gap_in_low",
        "short_low",  # the last two slices of the low-dose series are missing
        "duplicated_position",  # two low-dose slices lie at the same place
        "mixed_orientation",  # one low-dose slice is turned
        "two_patients",  # the low-dose series belongs to somebody else
        "two_studies",  # the low-dose series belongs to another study
        "not_mr",  # everything is CT
        "ct_beside",  # a CT series beside the pair
        "localizer",  # a three-plane localizer beside the pair
        "own_output",  # a series that lowgad made
        "pre_only",
        "short_pixels",  # one low-dose slice has half of its pixel data
        "absurd_size",  # one low-dose slice claims 40000 x 40000 pixels
        "not_dicom",  # one file of random bytes named .dcm
        "cut_file",  # one low-dose file ends in the middle of the pixel data
        "empty_file",
        "standard_dose",  # the second series was acquired at the full dose
    }
)

_PLANES: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    # 12 degrees about x, then 7 about z: a normal clinical double oblique.
    "oblique": ((0.99254615164132, 0.12186934340515, 0.0), (-0.11920620585475, 0.97085663684553, 0.20791169081776)),
}

_SEQUENCES: Mapping[str, Mapping[str, Any]] = {
    "MPRAGE": {
        "ScanningSequence": ["GR", "IR"],
        "SequenceVariant": ["SK", "SP", "MP"],
        "RepetitionTime": "2300",
        "EchoTime": "2.98",
        "InversionTime": "900",
        "FlipAngle": "9",
        "EchoTrainLength": "1",
    },
    "SPGR": {
        "ScanningSequence": "GR",
        "SequenceVariant": ["SS", "SP", "SK"],
        "RepetitionTime": "8.2",
        "EchoTime": "3.2",
        "FlipAngle": "12",
        "EchoTrainLength": "1",
    },
    "SE": {
        "ScanningSequence": "SE",
        "SequenceVariant": "SK",
        "RepetitionTime": "600",
        "EchoTime": "12",
        "FlipAngle": "90",
        "EchoTrainLength": "1",
    },
}


@dataclass(frozen=True)
class _Vendor:
    """How one manufacturer's classic MR images differ: attributes, and how the stored values are made."""

    attributes: Mapping[str, Any]
    bits_stored: int
    signed: bool = False
    scale_slope: bool = False  # rescale for display, and the private scale slope that makes values comparable


_VENDORS: Mapping[str, _Vendor] = {
    "siemens": _Vendor(
        {
            "Manufacturer": "SIEMENS",
            "ManufacturerModelName": "Skyra",
            "SoftwareVersions": "syngo MR E11",
            "ScanOptions": "PFP",
            "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
            "SequenceName": "*tfl3d1_16",
        },
        bits_stored=12,
    ),
    "ge": _Vendor(
        {
            "Manufacturer": "GE MEDICAL SYSTEMS",
            "ManufacturerModelName": "SIGNA Premier",
            "SoftwareVersions": ["29", "LX", "MR29.1"],
            "ScanOptions": ["FAST_GEMS", "EDR_GEMS"],
            "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
            "SequenceName": "",
        },
        bits_stored=16,
        signed=True,
    ),
    "philips": _Vendor(
        {
            "Manufacturer": "Philips",
            "ManufacturerModelName": "Ingenia Elition X",
            "SoftwareVersions": ["5.7.1", "5.7.1.3"],
            "ScanOptions": "OTHER",
            "ImageType": ["ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"],
            "SequenceName": "",
        },
        bits_stored=12,
        scale_slope=True,
    ),
    "canon": _Vendor(
        {
            "Manufacturer": "CANON_MEC",
            "ManufacturerModelName": "Vantage Galan 3T",
            "SoftwareVersions": "V6.0SP2001",
            "ScanOptions": ["SAT1", "AFI"],
            "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
            "SequenceName": "FE3D",
        },
        bits_stored=16,
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What a pair shall look like; everything has a healthy default. Texts are written as they are."""

    seed: int = 0  # another seed is another patient, study and noise
    slices: int = 8  # of each series
    rows: int = 24
    columns: int = 20
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.2)  # between columns, rows and slices
    thickness_mm: float | None = None  # SliceThickness; None is the distance between slices
    plane: str = "axial"  # or sagittal, coronal, oblique
    vendor: str = "siemens"  # unsigned 12 bit; ge (signed 16 bit), philips (two scalings), canon (unsigned 16 bit)
    sequence: str = "MPRAGE"  # or SPGR, SE
    field_strength_t: str | None = "3"  # MagneticFieldStrength; None leaves it out
    agent: str | None = "Gadovist"  # ContrastBolusAgent of the low-dose series; None leaves the module out
    volume_ml: str | None = "2.0"  # ContrastBolusVolume
    total_dose_ml: str | None = None  # ContrastBolusTotalDose
    concentration: str | None = None  # ContrastBolusIngredientConcentration
    agent_code: tuple[str, str, str] | None = None  # value, scheme, meaning in ContrastBolusAgentSequence
    weight_kg: str | None = "80"  # PatientWeight; None leaves it out
    start_time: str | None = None  # ContrastBolusStartTime
    charset: str | list[str] = "ISO_IR 100"  # SpecificCharacterSet
    patient_name: str = "Phantom^Test"  # encodable in `charset`
    pre_description: str = "t1_mprage_sag"  # SeriesDescription and ProtocolName
    low_description: str = "t1_mprage_sag_KM"
    pre_changes: Mapping[str, Any] = field(default_factory=dict)  # keyword to value in every slice; None deletes
    low_changes: Mapping[str, Any] = field(default_factory=dict)
    volumes: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None  # (k, j, i) of both; None is a phantom


@dataclass(frozen=True)
class SyntheticPair:
    """The two series of one study, slices in acquisition order."""

    pre: list[Dataset]
    low: list[Dataset]

    @property
    def all(self) -> list[Dataset]:
        """Both series."""
        return [*self.pre, *self.low]


def uid(*names: object) -> str:
    """A UID that depends on nothing but the names."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(map(str, names))).int}"


def make_pair(**options: Any) -> SyntheticPair:
    """A healthy pair: same geometry, the low-dose series later and with contrast attributes.

    Args:
        options: the fields of `Recipe`.
    """
    recipe = Recipe(**options)
    pre_voxels, low_voxels = recipe.volumes or _phantom(recipe)
    pre = {"SeriesNumber": "4", **_named(recipe.pre_description), **_times("100500")}
    low = {"SeriesNumber": "9", **_named(recipe.low_description), **_times("101500"), **_contrast(recipe)}
    return SyntheticPair(
        _series(recipe, "pre", pre_voxels, {**pre, **recipe.pre_changes}, gain=1.0),
        _series(recipe, "low", low_voxels, {**low, **recipe.low_changes}, gain=1.25),
    )


def _named(description: str) -> dict[str, str]:
    return {"SeriesDescription": description, "ProtocolName": description}


def _times(clock: str) -> dict[str, str]:
    events = ("Series", "Acquisition", "Content")
    return {f"{event}Date": "20240105" for event in events} | {f"{event}Time": clock for event in events}


def _contrast(recipe: Recipe) -> dict[str, Any]:
    """The Contrast/Bolus attributes of the low-dose series."""
    contrast: dict[str, Any] = {}
    if recipe.agent is not None:
        contrast = {
            "ContrastBolusAgent": recipe.agent,
            "ContrastBolusRoute": "IV",
            "ContrastBolusVolume": recipe.volume_ml,
            "ContrastBolusTotalDose": recipe.total_dose_ml,
            "ContrastBolusIngredientConcentration": recipe.concentration,
            "ContrastBolusStartTime": recipe.start_time,
        }
    if recipe.agent_code is not None:
        contrast["ContrastBolusAgentSequence"] = Sequence([code(*recipe.agent_code)])
    return contrast


def _series(
    recipe: Recipe, name: str, voxels: npt.NDArray[np.float64], attributes: Mapping[str, Any], *, gain: float
) -> list[Dataset]:
    """The slices of one series with these voxels (k, j, i); `attributes` come last and may remove what is before."""
    datasets = []
    for k, image in enumerate(voxels):
        dataset = _slice(recipe, k)
        dataset.SOPInstanceUID, dataset.SeriesInstanceUID = uid(recipe.seed, name, k), uid(recipe.seed, name)
        _set_pixels(dataset, image, _VENDORS[recipe.vendor], gain=gain)
        apply(dataset, attributes)
        datasets.append(dataset)
    return datasets


def write_study(folder: Path, *, odd: Iterable[str] = (), implicit: bool = False, **options: Any) -> list[Path]:
    """Write one study into `folder` (made if needed), one file per instance, and return the paths.

    Args:
        folder: where the files go; names are as meaningless as a scanner's.
        odd: names from `ODD_CASES`, applied together.
        implicit: write Implicit VR Little Endian.
        options: as for `make_pair`.
    """
    cases = set(odd)
    assert cases <= ODD_CASES, f"unknown odd case: {cases - ODD_CASES}"
    if "standard_dose" in cases:
        options = {"agent": "Gadovist", "volume_ml": "8", "weight_kg": "80", **options}
    pair = make_pair(**options)
    datasets = _odd_datasets(pair, cases)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, dataset in enumerate(datasets):
        paths.append(folder / f"IM{index:05d}.dcm")
        paths[-1].write_bytes(encode(dataset, implicit=implicit))
    return paths + _odd_files(folder, paths, cases)


def encode(dataset: Dataset, *, implicit: bool = False) -> bytes:
    """The bytes of a DICOM file."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    meta.ImplementationClassUID = uid("tests")
    dataset.file_meta = meta
    buffer = BytesIO()
    dataset.save_as(buffer, implicit_vr=implicit, little_endian=True, enforce_file_format=True)
    return buffer.getvalue()


def compress_file(path: Path, syntax: UID) -> None:
    """Write a DICOM file anew in a compressed transfer syntax; the lossy ones are off by at most a few stored units."""
    if syntax in (JPEGLossless, JPEGLosslessSV1):
        _compress_by_gdcm(path, syntax)
        return
    dataset = dcmread(path)
    options: dict[UID, dict[str, Any]] = {JPEGLSNearLossless: {"jls_error": 1}, JPEG2000: {"j2k_psnr": [100]}}
    compress(dataset, syntax, generate_instance_uid=False, **options.get(syntax, {}))
    dataset.save_as(path)


def _compress_by_gdcm(path: Path, syntax: UID) -> None:
    process = gdcm.TransferSyntax
    codes = {JPEGLossless: process.JPEGLosslessProcess14, JPEGLosslessSV1: process.JPEGLosslessProcess14_1}
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(process(codes[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def _phantom(recipe: Recipe) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Two noisy images (k, j, i) of a head of about 500 units, the second with the uptake of a lesion and a vessel."""
    shape, noise = (recipe.slices, recipe.rows, recipe.columns), np.random.default_rng(recipe.seed)
    k, j, i = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt((k / 0.95) ** 2 + (j / 0.9) ** 2 + (i / 0.8) ** 2)
    head = np.where(radius < 1, 420.0 + 120.0 * np.cos(4 * j) * np.cos(3 * i), 0.0)
    head[(radius > 0.85) & (radius < 1)] = 250.0
    lesion = np.exp(-(((k - 0.1) / 0.25) ** 2 + ((j - 0.2) / 0.2) ** 2 + ((i + 0.2) / 0.2) ** 2))
    vessel = np.exp(-(((j + 0.6) / 0.08) ** 2 + (i / 0.08) ** 2)) * (np.abs(k) < 0.8)
    uptake = 150.0 * np.where(lesion > 0.05, lesion, 0) + 250.0 * vessel
    return head + noise.normal(0, 6, shape), head + uptake + noise.normal(0, 6, shape)


def _patient_and_study(recipe: Recipe) -> dict[str, Any]:
    seed = recipe.seed
    return {
        "PatientName": recipe.patient_name,
        "PatientID": f"SYNTH{seed:05d}",
        "PatientBirthDate": "19700101",
        "PatientSex": "O",
        "PatientAge": "054Y",
        "PatientWeight": recipe.weight_kg,
        "StudyInstanceUID": uid(seed, "study"),
        "StudyID": "1",
        "StudyDate": "20240105",
        "StudyTime": "095900",
        "StudyDescription": "MR brain",
        "AccessionNumber": f"A{seed:05d}",
        "ReferringPhysicianName": "",
        "InstitutionName": "Synthetic Hospital",
        "StationName": "MR1",
        "DeviceSerialNumber": "12345",
        "Modality": "MR",
        "BodyPartExamined": "BRAIN",
        "PatientPosition": "HFS",
        "FrameOfReferenceUID": uid(seed, "frame"),
        "PositionReferenceIndicator": "",
        "AcquisitionNumber": "1",
        "MRAcquisitionType": "3D",
        "MagneticFieldStrength": recipe.field_strength_t,
        "ImagedNucleus": "1H",
        "ImagingFrequency": "123.25",
        "NumberOfAverages": "1",
    }


def _slice(recipe: Recipe, k: int) -> Dataset:
    """One classic MR slice without pixels; slice k lies k spacings along cross(row, column)."""
    row, column = (np.array(axis, dtype=float) for axis in _PLANES[recipe.plane])
    between_columns, between_rows, between_slices = recipe.spacing_mm
    position = np.array([-95.3, -110.7, -60.1]) + k * between_slices * np.cross(row, column)
    dataset = Dataset()
    apply(dataset, {"SpecificCharacterSet": recipe.charset})
    dataset.SOPClassUID = MRImageStorage
    for attributes in (_patient_and_study(recipe), _VENDORS[recipe.vendor].attributes, _SEQUENCES[recipe.sequence]):
        apply(dataset, attributes)
    dataset.InstanceNumber = str(k + 1)
    dataset.ImagePositionPatient = [_ds(value) for value in position]
    dataset.ImageOrientationPatient = [_ds(value) for value in (*row, *column)]
    dataset.PixelSpacing = [_ds(between_rows), _ds(between_columns)]
    dataset.SliceThickness = _ds(recipe.thickness_mm or between_slices)
    dataset.SpacingBetweenSlices = _ds(between_slices)
    dataset.SliceLocation = _ds(float(position @ np.cross(row, column)))
    return dataset


def _set_pixels(dataset: Dataset, signal: npt.NDArray[np.float64], vendor: _Vendor, *, gain: float) -> None:
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = signal.shape
    dataset.BitsAllocated = 16
    dataset.BitsStored, dataset.HighBit = vendor.bits_stored, vendor.bits_stored - 1
    dataset.PixelRepresentation = int(vendor.signed)
    stored = np.abs(signal)
    if vendor.scale_slope:
        # Both series show the same floating-point values, each with its own scaling (as the vendor does).
        scale_slope = float(np.float32(0.25 * gain))
        stored = stored * scale_slope
        dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", _ds(3.7 * gain), "normalized"
        block = dataset.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0x0E, "FL", scale_slope)
    dataset.PixelData = np.round(stored).astype("<i2" if vendor.signed else "<u2").tobytes()
    dataset.WindowCenter, dataset.WindowWidth = "400", "800"


def apply(dataset: Dataset, changes: Mapping[str, Any]) -> None:
    """Set elements by keyword; None deletes."""
    for keyword, value in changes.items():
        if value is not None:
            _set(dataset, keyword, value)
        elif keyword in dataset:
            delattr(dataset, keyword)


def _set(dataset: Dataset, keyword: str, value: Any) -> None:
    """Set an element, also to text that its value representation forbids: consoles write such things."""
    try:
        setattr(dataset, keyword, value)
    except ValueError:
        tag = tag_for_keyword(keyword)
        dataset.add(DataElement(tag, dictionary_VR(tag), value, already_converted=True))


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """An item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _ds(value: float) -> str:
    return str(format_number_as_ds(float(value)))


def _odd_datasets(pair: SyntheticPair, cases: set[str]) -> list[Dataset]:
    beside = _series_beside(pair, cases)
    pre, low = list(pair.pre), list(pair.low)
    for case in sorted(cases & _EDITS.keys()):
        _EDITS[case](pre, low)
    datasets = [*pre, *low, *beside]
    return [_as_ct(dataset) for dataset in datasets] if "not_mr" in cases else datasets


def _middle(datasets: list[Dataset]) -> Dataset:
    return datasets[len(datasets) // 2]


def _set_all(datasets: list[Dataset], **changes: Any) -> None:
    for dataset in datasets:
        apply(dataset, changes)


_EDITS: Mapping[str, Callable[[list[Dataset], list[Dataset]], None]] = {
    "gap_in_pre": lambda pre, low: pre.remove(_middle(pre)),
    "gap_in_low": lambda pre, low: low.remove(_middle(low)),
    "short_low": lambda pre, low: low.__delitem__(slice(-2, None)),
    "duplicated_position": lambda pre, low: apply(
        _middle(low), {"ImagePositionPatient": low[len(low) // 2 - 1].ImagePositionPatient}
    ),
    "mixed_orientation": lambda pre, low: apply(
        _middle(low), {"ImageOrientationPatient": ["0", "1", "0", "0", "0", "-1"]}
    ),
    "short_pixels": lambda pre, low: apply(
        _middle(low), {"PixelData": _middle(low).PixelData[: len(_middle(low).PixelData) // 4 * 2]}
    ),
    "absurd_size": lambda pre, low: apply(_middle(low), {"Rows": 40000, "Columns": 40000}),
    "two_patients": lambda pre, low: _set_all(low, PatientID="SOMEBODYELSE", PatientName="Else^Somebody"),
    "two_studies": lambda pre, low: _set_all(low, StudyInstanceUID=uid("another study")),
    "pre_only": lambda pre, low: low.clear(),
}


def _series_beside(pair: SyntheticPair, cases: set[str]) -> list[Dataset]:
    beside = []
    if "ct_beside" in cases:
        beside += [_as_ct(dataset) for dataset in _as_other_series(pair.pre, "ct")]
    if "localizer" in cases:
        beside += make_localizer(pair)
    if "own_output" in cases:
        for dataset in _as_other_series(pair.low, "own"):
            dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
            dataset.SyntheticData = "YES"
            beside.append(dataset)
    return beside


def make_localizer(pair: SyntheticPair) -> list[Dataset]:
    """A three-plane localizer of the same study: one slice per orientation, thick and of another sequence."""
    datasets = _as_other_series(pair.pre[:3], "localizer")
    for dataset, (row, column) in zip(datasets, _PLANES.values(), strict=False):
        dataset.ImageOrientationPatient = [_ds(value) for value in (*row, *column)]
        dataset.SeriesDescription = dataset.ProtocolName = "localizer"
        dataset.MRAcquisitionType, dataset.SliceThickness = "2D", "8"
        dataset.SeriesNumber = "1"
    return datasets


def another(datasets: Iterable[Dataset], name: str, **changes: Any) -> list[Dataset]:
    """The same slices as a further series of the same study, with `changes` in each."""
    copies = copy.deepcopy(list(datasets))
    for k, dataset in enumerate(copies):
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid(name), uid(name, k)
        apply(dataset, changes)
    return copies


def _as_other_series(datasets: list[Dataset], name: str) -> list[Dataset]:
    return another(datasets, f"{datasets[0].StudyInstanceUID}/{name}", SeriesNumber="77")


def _as_ct(dataset: Dataset) -> Dataset:
    dataset.SOPClassUID, dataset.Modality = CTImageStorage, "CT"
    return dataset


def _odd_files(folder: Path, paths: list[Path], cases: set[str]) -> list[Path]:
    extra = []
    if "not_dicom" in cases:
        extra.append(folder / "IM99998.dcm")
        extra[-1].write_bytes(np.random.default_rng(0).bytes(2048))
    if "empty_file" in cases:
        extra.append(folder / "IM99999.dcm")
        extra[-1].write_bytes(b"")
    if "cut_file" in cases:
        data = paths[-1].read_bytes()
        paths[-1].write_bytes(data[:-200])
    return extra
