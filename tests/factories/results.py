"""What a job found and what is made of it, without the pipeline: for tests of the objects and of their delivery."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset

from models.preprocess import Comparison, Prepared
from service.core.job import Kind
from worker.choose.pairing import Pair
from worker.compose.context import DerivationContext, Outputs
from worker.compose.results import Findings

CONTEXT = DerivationContext(
    model_id="test-model",
    model_version="7",
    model_sha256="ab" * 32,
    card_sha256="ef" * 32,
    notice="research use, trained on simulated data, not a medical device",
    config_hash="cd" * 32,
    agent="gadobutrol",
    administered_dose_mmol_per_kg=0.025,
    simulated_dose_mmol_per_kg=0.1,
    software_version="1.2.3",
    now=datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC),
)
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


def saved(folder: Path, instances: Sequence[Dataset]) -> list[Path]:
    """The paths of these instances, written into `folder` in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{n:04}.dcm" for n in range(len(instances))]
    for path, instance in zip(paths, instances, strict=True):
        instance.save_as(path, enforce_file_format=True)
    return paths
