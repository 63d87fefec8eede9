"""A simulated pair as a DICOM study, for demonstrations, tests and training material.

Hides how a phantom becomes classic MR instances (PS3.3 A.4) with honest headers: QualityControlImage YES, a patient
named as a phantom, and the acquisition values the simulator used. Deterministic: the same seed gives the same files.
Must never look like a patient.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from models.agents import Agent
from models.simulation.phantom import Phantom
from models.simulation.scenario import Scenario
from models.volume import Array

WHITE_MATTER_LEVEL = 900.0  # stored units
WEIGHT_KG = 75.0
_SEQUENCE_CODES = {"SPGR": ("GR", ["SP"]), "MPRAGE": ("GR", ["SP", "MP"]), "SE": ("SE", ["NONE"])}


@dataclass(frozen=True)
class _SeriesPlan:
    number: int
    description: str
    time: str
    voxels: Array
    dose_mmol_per_kg: float | None = None  # None before contrast


def write_phantom_study(phantom: Phantom, seed: int, folder: Path) -> int:
    """Write `pre/*.dcm`, `low/*.dcm` and, if acquired, `standard/*.dcm` (axial, 16 bit); the truth as `truth.npz`.

    Args:
        phantom: arrays (k, j, i), k along +z.
        seed: that made it; identifies the study.
        folder: created.

    Returns:
        Number of instances.
    """
    plans = {
        "pre": _SeriesPlan(2, "T1 3D pre", "100000", phantom.pre),
        "low": _SeriesPlan(5, "T1 3D post Gd low dose", "100900", phantom.low, phantom.scenario.dose_mmol_per_kg),
    }
    if phantom.standard is not None:
        dose = phantom.scenario.agent.standard_dose_mmol_per_kg
        plans["standard"] = _SeriesPlan(8, "T1 3D post Gd standard dose", "101900", phantom.standard, dose)
    written = 0
    for name, plan in plans.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(len(plan.voxels)):
            instance = _instance(phantom, seed, plan, index)
            instance.save_as(folder / name / f"{index + 1:04}.dcm", enforce_file_format=True)
            written += 1
    np.savez_compressed(
        folder / "truth.npz",
        ce=(phantom.enhancement * WHITE_MATTER_LEVEL).astype(np.float32),
        brain=phantom.brain,
        lesions=phantom.lesion_labels,
        lesion_diameters_mm=np.array(phantom.lesion_diameters_mm),
        dose_fraction=phantom.scenario.dose_fraction,
        wm=WHITE_MATTER_LEVEL,
    )
    return written


def _uid(seed: int, *parts: object) -> str:
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'lowgad phantom {seed} {parts}').int}"


def _instance(phantom: Phantom, seed: int, plan: _SeriesPlan, index: int) -> Dataset:
    out = Dataset()
    out.file_meta = FileMetaDataset()
    out.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    out.SOPClassUID = MRImageStorage
    out.SOPInstanceUID = _uid(seed, plan.number, index)
    _describe_study(out, seed)
    _describe_series(out, seed, plan)
    _describe_acquisition(out, phantom.scenario)
    if plan.dose_mmol_per_kg is not None:
        _describe_contrast(out, phantom.scenario.agent, plan.dose_mmol_per_kg)
    _describe_image(out, phantom.scenario, plan.voxels, index)
    return out


def _describe_study(out: Dataset, seed: int) -> None:
    out.SpecificCharacterSet = "ISO_IR 192"
    out.PatientName, out.PatientID = f"PHANTOM^DIGITAL {seed}", f"LOWGAD-PHANTOM-{seed}"
    out.PatientBirthDate, out.PatientSex = "", "O"
    out.PatientWeight = f"{WEIGHT_KG:g}"
    out.StudyInstanceUID, out.StudyID = _uid(seed, "study"), str(seed)[:16]
    out.StudyDate, out.StudyTime = "20260101", "095500"
    out.AccessionNumber, out.ReferringPhysicianName = "", ""
    out.StudyDescription = "lowgad digital phantom"
    out.QualityControlImage = "YES"


def _describe_series(out: Dataset, seed: int, plan: _SeriesPlan) -> None:
    out.Modality = "MR"
    out.SeriesInstanceUID, out.SeriesNumber = _uid(seed, plan.number), plan.number
    out.SeriesDescription = plan.description
    out.SeriesDate = out.AcquisitionDate = out.ContentDate = "20260101"
    out.SeriesTime = out.AcquisitionTime = out.ContentTime = plan.time
    out.Manufacturer, out.ManufacturerModelName = "Digital phantom", "lowgad simulator"
    out.DeviceSerialNumber, out.SoftwareVersions = "0", "1"
    out.FrameOfReferenceUID, out.PositionReferenceIndicator = _uid(seed, "frame"), ""
    out.BodyPartExamined, out.PatientPosition = "BRAIN", "HFS"
    out.AcquisitionNumber = 1


def _describe_acquisition(out: Dataset, scenario: Scenario) -> None:
    sequence = scenario.sequence
    out.ScanningSequence, out.SequenceVariant = _SEQUENCE_CODES[sequence.kind]
    out.ScanOptions = ""
    out.MRAcquisitionType = "2D" if sequence.kind == "SE" else "3D"
    out.MagneticFieldStrength = f"{scenario.field_strength_t:.4g}"
    stated = sequence.stated
    out.EchoTrainLength = 1
    for keyword, value, unit in (
        ("RepetitionTime", stated["repetition_time_s"], 1000),
        ("EchoTime", stated["echo_time_s"], 1000),
        ("InversionTime", stated["inversion_time_s"], 1000),
        ("FlipAngle", stated["flip_angle_deg"], 1),
    ):
        if value is not None:
            setattr(out, keyword, f"{value * unit:.5g}")


def _describe_contrast(out: Dataset, agent: Agent, dose_mmol_per_kg: float) -> None:
    out.ContrastBolusAgent, out.ContrastBolusRoute = agent.name, "IV"
    volume_ml = dose_mmol_per_kg * WEIGHT_KG / agent.concentration_mmol_per_ml
    out.ContrastBolusVolume = f"{volume_ml:.4g}"
    out.ContrastBolusStartTime, out.ContrastBolusIngredient = "100300", "GADOLINIUM"


def _describe_image(out: Dataset, scenario: Scenario, voxels: Array, index: int) -> None:
    spacing_i, spacing_j, spacing_k = scenario.spacing_mm
    slices, rows, columns = voxels.shape
    corner = [-(columns - 1) * spacing_i / 2, -(rows - 1) * spacing_j / 2, (index - (slices - 1) / 2) * spacing_k]
    out.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    out.InstanceNumber = index + 1
    out.ImagePositionPatient = [f"{value:.6g}" for value in corner]
    out.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    out.PixelSpacing = [f"{spacing_j:.6g}", f"{spacing_i:.6g}"]
    out.SliceThickness = out.SpacingBetweenSlices = f"{spacing_k:.6g}"
    out.SamplesPerPixel, out.PhotometricInterpretation = 1, "MONOCHROME2"
    out.Rows, out.Columns = rows, columns
    out.BitsAllocated, out.BitsStored, out.HighBit, out.PixelRepresentation = 16, 16, 15, 0
    stored = np.clip(np.rint(voxels[index] * WHITE_MATTER_LEVEL), 0, 65535).astype("<u2")
    out.PixelData = stored.tobytes()
    out["PixelData"].VR = "OW"
