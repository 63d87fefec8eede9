"""The story of one study: read, choose, check, preprocess, infer, check, compose.

Hides nothing: this is where to start reading. Must never touch pixels of the source, and never return a result that a
check has refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from models.preprocess import Prepared, prepare
from models.quality import Figure, judge_conditions, judge_pair, judge_signal
from models.runtime import Engine, at_dose
from models.volume import Array
from service.core.dicom.site_rules import SiteRule
from service.core.job import JobOptions, Stage
from worker.choose.acquisition import check_acquisition, read_acquisition
from worker.choose.pairing import choose_pair
from worker.choose.refusal import named_reasons, refuse
from worker.compose.context import Outputs, make_context
from worker.compose.report import report_findings, report_result
from worker.compose.results import Findings, compose
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
    rules: Sequence[SiteRule] = (),
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
        rules: of the site.
        outputs: the kinds of result that are wanted, and how they are made.
        now: clock of the dates in the derived instances.

    Raises:
        Permanent: with the named reason; see service.core.errors.
    """
    clock = _Clock(progress)
    clock.enter(Stage.READ)
    study = read_study(paths, rules)
    clock.enter(Stage.CHOOSE)
    pair = choose_pair(study, options.pre_series_uid, options.low_series_uid)
    acquisition = read_acquisition(pair)
    check_acquisition(acquisition, allow_unknown)
    clock.enter(Stage.PREPROCESS)
    with named_reasons():
        prepared = prepare(pair.pre.volume(), pair.low.volume(), progress=clock.advance)
    conditions = acquisition.conditions(prepared)
    figures = (*pair.likeness, *judge_pair(prepared), *judge_conditions(conditions))
    refuse(figures, pair.witnesses)
    clock.enter(Stage.INFER)
    with named_reasons():
        signal = engine.predict(prepared, conditions, clock.advance)
    signal = at_dose(signal, prepared, conditions, outputs.dose_factor)
    figures += judge_signal(signal, prepared, conditions)
    refuse(figures)
    clock.enter(Stage.COMPOSE)
    findings = report_findings(pair, acquisition, prepared, figures, engine=engine, options=options)
    context = make_context(engine, acquisition, conditions, outputs, numbers=study.series_numbers, now=now())
    series = compose(Findings(pair, prepared, signal, findings, context), outputs)
    clock.enter(Stage.WRITE)
    return Result(series, report_result(findings, series, clock.seconds()), figures, prepared, signal)


_STARTS = {  # stage: the fraction of the whole that is done when it starts
    Stage.READ: 0.0,
    Stage.CHOOSE: 0.1,
    Stage.PREPROCESS: 0.15,
    Stage.INFER: 0.5,
    Stage.COMPOSE: 0.8,
    Stage.WRITE: 0.9,
}


class _Clock:
    """Tells the stage and how far it is, and keeps how long each took."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._entered: list[tuple[Stage, float]] = []

    def enter(self, stage: Stage) -> None:
        """A stage begins."""
        self._entered.append((stage, time.monotonic()))
        self._progress(stage, _STARTS[stage])

    def advance(self, part: float) -> None:
        """Tell which part of the present stage is done."""
        stage = self._entered[-1][0]
        start, end = next(two for two in pairwise(_STARTS.values()) if two[0] == _STARTS[stage])
        self._progress(stage, start + (end - start) * part)

    def seconds(self) -> dict[str, float]:
        """How long each stage took that has ended, by its name."""
        return {stage.value: round(end - at, 2) for (stage, at), (_, end) in pairwise(self._entered)}
