"""Training curves: log.csv of a run as one PNG. Hides matplotlib; draws what the log holds and computes nothing."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

LABELS = {
    "loss": "training loss",
    "ce_error": "validation: mean error in enhancing brain",
    "slope": "validation: slope of signal on truth",
    "false_per_ml": "validation: false voxels per mL",
}
BEST = {"slope": 1.0}  # where it is not 0


def draw_curves(log: Path, out: Path) -> None:
    """One panel over the steps for every column of the log but `step` and `minutes`.

    Args:
        log: log.csv of `models.training.train`; signals in units of white matter.
        out: PNG to write.

    Raises:
        ValueError: the log has no row, or a value is not a number.
    """
    with log.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{log.name} has no rows")
    names = [name for name in rows[0] if name not in {"step", "minutes"}]
    figure = Figure(figsize=(4.2 * len(names), 3.6))
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], marker="o", markersize=3)
        axis.axhline(BEST.get(name, 0.0), color="grey", linewidth=0.8, linestyle=":")
        axis.set(xlabel="step", title=LABELS.get(name, name))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=80)
