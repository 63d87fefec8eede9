"""Figures of an evaluation as PNG files. Hides matplotlib; draws what it is given and computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from models.condition import Conditions
from models.evaluation.metrics import Interval
from models.volume import Array

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Curve = Mapping[float, Interval]  # x to mean with interval


def draw_curves(path: Path, panels: Sequence[tuple[str, Mapping[str, Curve]]], x: str, *, log: bool = False) -> None:
    """One panel for each (label of y, method to curve), with 95 % intervals; x as logarithms of 2 where `log`."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False)
    for axis, (label, curves) in zip(axes[0], panels, strict=True):
        for name, curve in curves.items():
            at = np.array(list(curve))
            mean, low, high = np.array(list(curve.values())).T
            line = axis.plot(at, mean, marker="o", markersize=3, label=name)[0]
            axis.fill_between(at, low, high, alpha=0.15, color=line.get_color())
        axis.set(xlabel=x, ylabel=label)
        if log:
            axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    _save(figure, path)


def draw_bars(path: Path, groups: Sequence[str], bars: Mapping[str, Sequence[Interval]], label: str) -> None:
    """Grouped bars with intervals: one group on the x axis, one bar for each method."""
    figure, axis = plt.subplots(figsize=(8, 3.8))
    width = 0.8 / len(bars)
    for n, (name, values) in enumerate(bars.items()):
        mean, low, high = np.array(values).T
        at = np.arange(len(groups)) + (n - (len(bars) - 1) / 2) * width
        axis.bar(at, mean, width, label=name, yerr=np.nan_to_num([mean - low, high - mean]), capsize=2)
    axis.set_xticks(np.arange(len(groups)), groups)
    axis.set(ylabel=label)
    axis.legend(fontsize=8)
    _save(figure, path)


def draw_embedding(path: Path, grid: Sequence[Conditions], embedded: Array) -> None:
    """First two principal components of the embedding, coloured by field strength, agent and dose."""
    centred = embedded - embedded.mean(axis=0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    at = left[:, :2] * size[:2]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    names = ("field_strength_t", "agent", "dose_fraction")
    for axis, name in zip(axes, names, strict=True):
        values = [getattr(one, name) for one in grid]
        labels = [value if isinstance(value, str) else f"{value:.2g}" for value in values]
        for label in dict.fromkeys(labels):
            some = [other == label for other in labels]
            axis.scatter(at[some, 0], at[some, 1], s=14, label=label)
        axis.set(title=name, xlabel="component 1", ylabel="component 2")
        axis.legend(fontsize=7)
    _save(figure, path)


def draw_examples(path: Path, rows: Sequence[Mapping[str, Array]]) -> None:
    """One row of slices (j, i) for each study; images named pre are grey from 0 to 1.4, signals from 0 to 1."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(2.3 * len(rows[0]), 2.4 * len(rows)), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, (name, image) in zip(line, row.items(), strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1.4 if name.startswith("pre") else 1.0)
            axis.set_title(name, fontsize=8)
            axis.axis("off")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
