"""The model card's figures: the network against the linear engine on held-out simulated studies and on a real pair.

Hides the protocol: fixed seeds, doses and metrics (models.training.evaluate), and the rendering of CARD.md. The real
pair goes through the same pipeline as a hospital's study. Must never choose what to report by its result.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from models.card import Card
from models.runtime import Engine, LinearEngine, NetworkEngine
from models.training.evaluate import (
    Method,
    Score,
    error_ratio,
    held_out,
    linear_method,
    raw_method,
    score,
    score_all,
    summary,
)
from models.training.samples import Sample
from models.volume import Array
from service.core.job import JobOptions
from worker.pipeline import run
from worker.study import find_files

DOSES = (0.10, 0.33)
Say = Callable[[str], None]
Row = dict[str, str]


def write_card(folder: Path, *, studies: int, real: tuple[Path, Path] | None, say: Say) -> None:
    """Evaluate a model folder and write figures.csv and CARD.md into it.

    Args:
        folder: with model.onnx and card.toml.
        studies: simulated studies per dose.
        real: DICOM folder of a pair and its truth (npz: ce and brain (k, j, i) on the pre-contrast grid in ascending
            slice order, wm: white-matter level, both in stored units).
        say: told every row.
    """
    engine = NetworkEngine(folder)
    rows = simulated_rows(engine, studies, say) + (real_rows(engine, *real, say) if real else [])
    with (folder / "figures.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "CARD.md").write_text(render(engine.card, rows, studies), encoding="utf-8")


def simulated_rows(engine: NetworkEngine, studies: int, say: Say) -> list[Row]:
    """Means and 95 % intervals over held-out simulated studies, one row for each dose and method."""

    def network(sample: Sample) -> Array:
        return engine.run(sample.images.astype(np.float32), sample.condition)

    methods: dict[str, Method] = {"network": network, "linear engine": linear_method, "raw amplification": raw_method}
    rows: list[Row] = []
    for dose in DOSES:
        samples = held_out(studies, dose)
        scores = {name: score_all(samples, method) for name, method in methods.items()}
        for name, found in scores.items():
            text = {metric: _with_interval(value) for metric, value in summary(found).items()}
            ratio = "" if name == "linear engine" else _with_interval(error_ratio(found, scores["linear engine"]))
            rows.append(_row(f"simulated, {dose:.0%} dose", name, text, ratio, say))
    return rows


def _with_interval(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"


def real_rows(engine: NetworkEngine, study: Path, truth: Path, say: Say) -> list[Row]:
    """One row for each engine on a pair whose truth is known; SD minus pre-contrast is what the engine added."""
    known = np.load(truth)
    scores = {"network": _score_real(engine, study, known), "linear engine": _score_real(LinearEngine(), study, known)}
    rows: list[Row] = []
    for name, found in scores.items():
        ratio = "" if name == "linear engine" else f"{found.ce_error / scores['linear engine'].ce_error:.3f}"
        rows.append(_row("real pair", name, {metric: f"{v:.3f}" for metric, v in asdict(found).items()}, ratio, say))
    return rows


def _score_real(engine: Engine, study: Path, known: Mapping[str, Array]) -> Score:
    result = run(find_files(study), JobOptions(), engine, lambda *_: None)
    signal = result.prepared.signal_on_pre(result.signal) / float(known["wm"])
    spacing = result.prepared.native_pre.spacing_mm
    figures = score(signal, known["ce"] / np.float32(known["wm"]), known["brain"].astype(bool), spacing)
    if figures is None:
        raise ValueError("nothing enhances in the truth of the real pair")
    return figures


def _row(data: str, method: str, metrics: Mapping[str, str], ratio: str, say: Say) -> Row:
    row = {"data": data, "method": method, **metrics, "error_over_linear": ratio}
    say(", ".join(value for value in row.values() if value))
    return row


def render(card: Card, rows: Sequence[Row], studies: int) -> str:
    """CARD.md."""
    head = (
        f"# {card.id}\n\n"
        f"**{card.intended_use}.**\n\n"
        f"Predicts the contrast signal of the standard dose from a pre-contrast and a low-dose T1 volume.\n\n"
        f"| | |\n| --- | --- |\n| variant | {card.variant} |\n| training data | {card.training_data} |\n"
        f"| training | preset {card.preset}, {card.steps} steps, seed {card.seed} |\n"
        f"| operating point | gate offset {card.gate_offset:g}, chosen on validation studies |\n"
        f"| ONNX opset | {card.opset} |\n| contract | {card.contract} |\n"
        f"| SHA-256 of model.onnx | `{card.sha256}` |\n\n"
    )
    limits = "## What it cannot do\n\n" + "".join(f"- {limit}\n" for limit in card.limits)
    figures = (
        "\n## Figures\n\n"
        f"Simulated: {studies} studies per dose from seeds no training run used; mean and 95 % bootstrap interval over "
        "studies. Signals in units of white matter. `ce_error`: mean absolute error where the truth enhances by more "
        "than 0.1. `slope`, `intercept`: of the predicted on the true signal there. `false_per_ml`: voxels above 0.1 "
        "per mL of brain farther than 2.5 mm from true enhancement. `error_over_linear`: ratio of mean CE errors.\n\n"
    )
    names = list(rows[0])
    table = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return head + limits + figures + "".join(f"| {' | '.join(line)} |\n" for line in table)
