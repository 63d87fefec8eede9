"""The files of a result: `<kind>/<number>.dcm`, and `report.json` beside them.

Hides how they are named. Must never leave an earlier result beside the reason why there is none now.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from service.core.job import Kind

REPORT = "report.json"


@dataclass(frozen=True)
class Written:
    """One derived instance that was written. `path` is relative to the folder."""

    kind: str
    sop_class_uid: str
    sop_instance_uid: str
    path: str


def write_result(series: Mapping[str, Sequence[Dataset]], report: Mapping[str, Any], folder: Path) -> list[Written]:
    """Write `<kind>/<number>.dcm` and `report.json` into an existing folder."""
    written = []
    for kind, instances in series.items():
        (folder / kind).mkdir()
        for number, instance in enumerate(instances, start=1):
            path = f"{kind}/{number:04}.dcm"
            instance.save_as(folder / path, enforce_file_format=True)
            written.append(Written(kind, str(instance.SOPClassUID), str(instance.SOPInstanceUID), path))
    write_report(report, folder)
    return written


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json` into an existing folder."""
    (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")


def remove_result(folder: Path) -> None:
    """Remove what an earlier run wrote into a folder, which need not exist."""
    for kind in Kind:
        shutil.rmtree(folder / kind.value, ignore_errors=True)
    (folder / REPORT).unlink(missing_ok=True)
