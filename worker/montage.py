"""A picture of a result for people: pre-contrast, low dose, synthetic standard dose and the predicted signal, side by
side.

Hides the choice of slices (those with most signal, spread over the head) and of window. For looking, never for
reading.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from models.card import RESEARCH_USE
from models.preprocess import Prepared
from models.volume import Array

TITLES = ("pre-contrast", "low dose", "synthetic standard dose", "predicted signal")
WINDOW = 1.8  # white matter = 1 is shown at 55 % of white
ROWS, PANEL_PIXELS, LINE_PIXELS = 3, 320, 18


def write_montage(prepared: Prepared, signal: Array, path: Path, truth: Array | None = None) -> None:
    """Write a PNG of three slices.

    Args:
        prepared: the pair on the working grid.
        signal: (k, j, i) on the same grid, white matter = 1.
        path: of the PNG.
        truth: the true signal on the same grid, where it is known; adds a column.
    """
    pre, subtraction = prepared.pre.voxels, prepared.comparison.subtraction
    columns = [pre, pre + subtraction, pre + signal, signal, *([truth] if truth is not None else [])]
    titles = [*TITLES, *(["true signal"] if truth is not None else [])]
    spacing_i, spacing_j, _ = prepared.pre.spacing_mm
    sheet = Image.new("L", (PANEL_PIXELS * len(columns), LINE_PIXELS * 2 + PANEL_PIXELS * ROWS), 0)
    draw = ImageDraw.Draw(sheet)
    for column, (title, voxels) in enumerate(zip(titles, columns, strict=True)):
        draw.text((column * PANEL_PIXELS + 4, 3), title, fill=255)
        for row, k in enumerate(_slices(signal)):
            panel = _panel(voxels[k], spacing_j / spacing_i, 1.0 if voxels is signal or voxels is truth else WINDOW)
            sheet.paste(panel, (column * PANEL_PIXELS, LINE_PIXELS + row * PANEL_PIXELS))
    draw.text((4, sheet.height - LINE_PIXELS + 3), RESEARCH_USE, fill=255)
    sheet.save(path)


def _slices(signal: Array) -> list[int]:
    """One slice of most signal from each third of the slices that hold any."""
    amount = signal.sum(axis=(1, 2))
    used = np.flatnonzero(amount > 0)
    parts = np.array_split(used if used.size >= ROWS else np.arange(len(amount)), ROWS)
    return [int(part[np.argmax(amount[part])]) if part.size else 0 for part in parts]


def _panel(slice_: npt.NDArray[np.float32], aspect: float, white: float) -> Image.Image:
    grey = Image.fromarray((np.clip(slice_ / white, 0, 1) * 255).astype(np.uint8))
    rows, columns = slice_.shape[0] * aspect, float(slice_.shape[1])
    scale = PANEL_PIXELS / max(rows, columns)
    fitted = grey.resize((max(1, round(columns * scale)), max(1, round(rows * scale))), Image.Resampling.BILINEAR)
    panel = Image.new("L", (PANEL_PIXELS, PANEL_PIXELS), 0)
    panel.paste(fitted, ((PANEL_PIXELS - fitted.width) // 2, (PANEL_PIXELS - fitted.height) // 2))
    return panel
