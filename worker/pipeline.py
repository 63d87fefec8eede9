"""The story of one study: read, choose, check, preprocess, infer, check, compose.

Hides nothing: this is where to start reading. Must never touch pixels of the source, and never return a result that a
check has refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from models.agents import BY_NAME
from models.brain import NoBrainError
from models.condition import CONTRACT_VERSION, Conditions
from models.preprocess import Prepared, prepare
from models.quality import LIMITS, Figure, Gate, judge_conditions, judge_pair, judge_signal, refused
from models.registration import RegistrationError
from models.runtime import Engine, OutputError, UnknownDoseError, at_dose
from models.volume import Array
from service.core.dicom.site_rules import Protocol
from service.core.errors import Permanent, Reason
from service.core.job import JobOptions, Stage
from worker.choose.acquisition import Acquisition, check_acquisition, read_acquisition
from worker.choose.pairing import Pair, choose_pair
from worker.compose.provenance import DerivationContext
from worker.compose.results import Findings, Outputs, compose
from worker.read.sequence import judge_likeness
from worker.read.study import read_study

Progress = Callable[[Stage, float], None]
DEFAULT_OUTPUTS = Outputs()


@dataclass(frozen=True)
class Result:
    """Derived instances by kind, the report, its quality figures, and the prepared pair and the signal on its grid."""

    series: dict[str, list[Dataset]]
    report: dict[str, Any]
    figures: tuple[Figure, ...]
    prepared: Prepared
    signal: Array


def run(
    paths: Sequence[Path],
    options: JobOptions,
    engine: Engine,
    progress: Progress,
    *,
    allow_unknown: Collection[str] = (),
    protocols: Sequence[Protocol] = (),
    outputs: Outputs = DEFAULT_OUTPUTS,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Result:
    """Process one study.

    Args:
        paths: its DICOM files.
        options: series named by the caller, if any.
        engine: network or linear.
        progress: told the stage and the fraction of the whole.
        allow_unknown: acquisition values that may be unknown: field_strength, agent, dose.
        protocols: the site's rules.
        outputs: the kinds of result that are wanted, and how they are made.
        now: clock of the dates in the derived instances.

    Raises:
        Permanent: with the named reason; see service.core.errors.
    """
    clock = _Clock(progress)
    clock.enter(Stage.READ, 0.0)
    study = read_study(paths)
    clock.enter(Stage.CHOOSE, 0.1)
    pair = choose_pair(study, options.pre_series_uid, options.low_series_uid, protocols)
    acquisition = read_acquisition(pair, protocols)
    check_acquisition(acquisition, allow_unknown)
    clock.enter(Stage.PREPROCESS, 0.15)
    prepared = _prepare(pair, lambda part: progress(Stage.PREPROCESS, 0.15 + 0.35 * part))
    conditions = acquisition.conditions(prepared)
    figures = (*judge_likeness(pair.pre, pair.low), *judge_pair(prepared), *judge_conditions(conditions))
    refuse(figures, pair.witnesses)
    clock.enter(Stage.INFER, 0.5)
    signal = _predict(engine, prepared, conditions, lambda part: progress(Stage.INFER, 0.5 + 0.3 * part))
    signal = at_dose(signal, prepared, conditions, outputs.dose_factor)
    figures += judge_signal(signal, prepared, conditions)
    refuse(figures)
    clock.enter(Stage.COMPOSE, 0.8)
    report = _report(pair, acquisition, prepared, figures, engine=engine, options=options)
    context = _context(engine, acquisition, conditions, outputs, numbers=study.series_numbers, now=now())
    series = compose(Findings(pair, prepared, signal, report, context), outputs)
    clock.enter(Stage.WRITE, 0.9)
    report |= {"results": {kind: _listed(found) for kind, found in series.items()}, "seconds": clock.seconds()}
    return Result(series, report, figures, prepared, signal)


@dataclass(frozen=True)
class Written:
    """One derived instance that was written. `path` is relative to the folder."""

    kind: str
    sop_class_uid: str
    sop_instance_uid: str
    path: str


def write_result(series: Mapping[str, Sequence[Dataset]], report: dict[str, Any], folder: Path) -> list[Written]:
    """Write `<kind>/<number>.dcm` and `report.json` into an existing folder."""
    written = []
    for kind, instances in series.items():
        (folder / kind).mkdir()
        for number, instance in enumerate(instances, start=1):
            path = f"{kind}/{number:04}.dcm"
            instance.save_as(folder / path, enforce_file_format=True)
            written.append(Written(kind, str(instance.SOPClassUID), str(instance.SOPInstanceUID), path))
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return written


class _Clock:
    """Tells the stage, and keeps how long each took."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._entered: list[tuple[Stage, float]] = []

    def enter(self, stage: Stage, fraction: float) -> None:
        self._entered.append((stage, time.monotonic()))
        self._progress(stage, fraction)

    def seconds(self) -> dict[str, float]:
        ends = [at for _, at in self._entered[1:]]
        return {stage.value: round(end - at, 2) for (stage, at), end in zip(self._entered, ends, strict=False)}


def _prepare(pair: Pair, progress: Callable[[float], None]) -> Prepared:
    try:
        return prepare(pair.pre.volume(), pair.low.volume(), progress=progress)
    except (NoBrainError, RegistrationError) as error:
        raise Permanent(Reason.REGISTRATION_FAILED, str(error)) from error


_MEASURED = {"sigma": None, "noise_left": None}  # follow from the input, and in their last digits from the machine


def _context(
    engine: Engine,
    acquisition: Acquisition,
    conditions: Conditions,
    outputs: Outputs,
    *,
    numbers: frozenset[int],
    now: datetime,
) -> DerivationContext:
    """What the derived instances say about their making.

    The configuration hash covers all that decides the result beside the input and the model, so that another software
    version, dose, watermark or execution provider never reuses a UID. Which kinds are made decides nothing about any.
    """
    version = metadata.version("lowgad")
    chosen = asdict(outputs) | {"kinds": None}
    made_by = [version, CONTRACT_VERSION, engine.name, engine.provider]
    decided = [*made_by, *(asdict(conditions) | _MEASURED | chosen).values()]
    agent = BY_NAME.get(acquisition.agent.value or "")
    return DerivationContext(
        model_id=engine.name,
        model_version=engine.version,
        model_sha256=engine.digest,
        card_sha256=engine.card_digest,
        notice=engine.notice,
        config_hash=hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:32],
        agent=acquisition.agent.value,
        administered_dose_mmol_per_kg=acquisition.dose_mmol_per_kg.value,
        simulated_dose_mmol_per_kg=agent.standard_dose_mmol_per_kg * outputs.dose_factor if agent else None,
        software_version=version,
        now=now,
        series_numbers_in_use=numbers,
    )


def _listed(instances: Sequence[Dataset]) -> dict[str, Any]:
    """What the report says of one kind of result."""
    first = instances[0]
    return {
        "series_instance_uid": str(first.SeriesInstanceUID),
        "sop_class_uid": str(first.SOPClassUID),
        "description": str(first.SeriesDescription),
        "instances": len(instances),
    }


GATES = {
    Gate.PAIR: Reason.PAIR_NOT_COMPARABLE,
    Gate.ORDER: Reason.SERIES_SWAPPED,
    Gate.CONDITIONS: Reason.OUTSIDE_TRAINING,
    Gate.OUTPUT: Reason.OUTPUT_INVALID,
}


def refuse(figures: Sequence[Figure], witnesses: Sequence[str] = ()) -> None:
    """Stop where a figure refuses; who said which series is which is told where that is in question.

    Raises:
        Permanent: with the reason of the first gate that is shut, and all figures as its report.
    """
    shut = refused(figures)
    if shut:
        gate, said = shut
        detail = "; ".join([said, *(witnesses if gate is Gate.ORDER else ())])
        raise Permanent(GATES[gate], detail, report={"quality": [figure.row() for figure in figures]})


def _predict(engine: Engine, prepared: Prepared, conditions: Conditions, progress: Callable[[float], None]) -> Array:
    try:
        return engine.predict(prepared, conditions, progress)
    except UnknownDoseError as error:
        raise Permanent(Reason.UNKNOWN_DOSE, str(error)) from error
    except OutputError as error:
        raise Permanent(Reason.OUTPUT_INVALID, str(error)) from error


def _image_witness(pair: Pair, figures: Sequence[Figure]) -> str:
    """What the images themselves say of the order, when it did not refuse the study."""
    more = -next(figure.value for figure in figures if figure.name == "darkening")
    says = f"{pair.pre.label} is pre-contrast" if more > LIMITS["darkening"].works[1] else "silent"
    return f"images: {says}, {100 * more:.2f} % of the brain brightens with the low dose, less what darkens"


def _report(
    pair: Pair,
    acquisition: Acquisition,
    prepared: Prepared,
    figures: Sequence[Figure],
    *,
    engine: Engine,
    options: JobOptions,
) -> dict[str, Any]:
    """What `report.json` says: how the result came about, in plain values and without patient data."""
    comparison = prepared.comparison
    return {
        "outcome": "DONE",
        "notice": engine.notice,
        "engine": {name: getattr(engine, name) for name in ("name", "version", "provider")} | {"sha256": engine.digest},
        "options": asdict(options),
        "series": {
            "pre": {"series_instance_uid": pair.pre.series_uid, "slices": len(pair.pre.planes)},
            "low": {"series_instance_uid": pair.low.series_uid, "slices": len(pair.low.planes)},
            "witnesses": [*pair.witnesses, _image_witness(pair, figures)],
            "set_aside": list(pair.set_aside),
        },
        "acquisition": asdict(acquisition),
        "preprocessing": {
            "gain": round(float(comparison.gain * prepared.scale / prepared.low_scale), 5),
            "white_matter_level": round(prepared.scale, 3),
            "noise": round(comparison.sigma, 5),
            "rotation_rad_and_shift_mm": [float(p) for p in prepared.pre_to_low.GetParameters()],
            "working_spacing_mm": list(prepared.pre.spacing_mm),
        },
        "quality": [figure.row() for figure in figures],
    }
