"""`report.json`: how a result came about, or why there is none, in plain values and without patient data.

Hides its shapes, that of a study which was processed and that of one which was not. Must never give a value without its
source, or leave out a figure that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydicom.dataset import Dataset

from models.brain import extractor_digest
from models.preprocess import Prepared
from models.quality import Figure
from models.runtime import Engine
from service.core.errors import LowgadError
from service.core.job import JobOptions
from worker.choose.acquisition import Acquisition
from worker.choose.pairing import Pair, image_witness


def report_findings(
    pair: Pair,
    acquisition: Acquisition,
    prepared: Prepared,
    figures: Sequence[Figure],
    *,
    engine: Engine,
    options: JobOptions,
) -> dict[str, Any]:
    """What is known when the results are composed: how the signal came about."""
    comparison = prepared.comparison
    return {
        "outcome": "DONE",
        "notice": engine.notice,
        "engine": {name: getattr(engine, name) for name in ("name", "version", "provider")} | {"sha256": engine.digest},
        "options": asdict(options),
        "series": {
            "pre": {"series_instance_uid": pair.pre.series_uid, "slices": len(pair.pre.planes)},
            "low": {"series_instance_uid": pair.low.series_uid, "slices": len(pair.low.planes)},
            "witnesses": [*pair.witnesses, image_witness(pair, figures)],
            "set_aside": list(pair.set_aside),
        },
        "acquisition": asdict(acquisition),
        "preprocessing": {
            "gain": round(float(comparison.gain * prepared.scale / prepared.low_scale), 5),
            "white_matter_level": round(prepared.scale, 3),
            "noise": round(comparison.sigma, 5),
            "rotation_rad_and_shift_mm": [float(p) for p in prepared.pre_to_low.GetParameters()],
            "working_spacing_mm": list(prepared.pre.spacing_mm),
            "brain_extractor_sha256": extractor_digest(),
        },
        "quality": [figure.row() for figure in figures],
    }


def report_result(
    findings: Mapping[str, Any], series: Mapping[str, Sequence[Dataset]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """The whole report of a study that was processed: the findings, what was made of them, and how long it took.

    Args:
        findings: from `report_findings`; the structured report is made from them, and cannot name itself.
        series: the instances by kind.
        seconds: by stage.
    """
    return {
        **findings,
        "results": {kind: _listed(instances) for kind, instances in series.items()},
        "seconds": dict(seconds),
    }


def _listed(instances: Sequence[Dataset]) -> dict[str, Any]:
    """What the report says of one kind of result."""
    first = instances[0]
    return {
        "series_instance_uid": str(first.SeriesInstanceUID),
        "sop_class_uid": str(first.SOPClassUID),
        "description": str(first.SeriesDescription),
        "instances": len(instances),
    }


def report_refusal(error: LowgadError) -> dict[str, Any]:
    """The whole report of a study that gave no result: why, and what was measured until then."""
    reason = error.reason
    told = {"outcome": reason.outcome.name, "reason": reason.name, "text": reason.text, "detail": error.detail}
    return {**told, **error.report}
