"""A picture of a result for people: pre-contrast, low dose, synthetic standard dose, predicted signal.

Hides the choice of slices (those with most signal, spread over the head) and the layout. For looking, not for reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from models.card import RESEARCH_USE
from models.preprocess import Prepared
from models.volume import Array

ROWS, PANEL_PIXELS, LINE_PIXELS = 3, 320, 18
IMAGE_WHITE, SIGNAL_WHITE = 1.8, 1.0  # shown as white, in units of white matter


def write_montage(prepared: Prepared, signal: Array, path: Path) -> None:
    """Write the PNG of a result on its working grid; `signal` is (k, j, i), white matter = 1."""
    pre, low = prepared.pre.voxels, prepared.pre.voxels + prepared.comparison.subtraction
    images = {"pre-contrast": pre, "low dose": low, "synthetic standard dose": pre + signal}
    write_sheet(images, {"predicted signal": signal}, prepared.pre.spacing_mm, path)


def write_sheet(
    images: Mapping[str, Array], signals: Mapping[str, Array], spacing_mm: tuple[float, float, float], path: Path
) -> None:
    """Write three slices, a column for each image and each signal.

    Args:
        images: title to (k, j, i), white matter = 1.
        signals: title to (k, j, i) on the same grid; the first one decides which slices are shown.
        spacing_mm: along i, j, k.
        path: of the PNG.
    """
    columns = [(title, voxels, IMAGE_WHITE) for title, voxels in images.items()]
    columns += [(title, voxels, SIGNAL_WHITE) for title, voxels in signals.items()]
    slices = _slices(next(iter(signals.values())))
    sheet = Image.new("L", (PANEL_PIXELS * len(columns), LINE_PIXELS * 2 + PANEL_PIXELS * len(slices)), 0)
    draw = ImageDraw.Draw(sheet)
    for column, (title, voxels, white) in enumerate(columns):
        draw.text((column * PANEL_PIXELS + 4, 3), title, fill=255)
        for row, k in enumerate(slices):
            panel = _panel(voxels[k] / np.float32(white), spacing_mm[1] / spacing_mm[0])
            sheet.paste(panel, (column * PANEL_PIXELS, LINE_PIXELS + row * PANEL_PIXELS))
    draw.text((4, sheet.height - LINE_PIXELS + 3), RESEARCH_USE, fill=255)
    sheet.save(path)


def _slices(signal: Array) -> list[int]:
    """The slice of most signal from each third of the slices that hold any."""
    amount = signal.sum(axis=(1, 2))
    used = np.flatnonzero(amount > 0)
    parts = np.array_split(used if used.size >= ROWS else np.arange(len(amount)), ROWS)
    return [int(part[np.argmax(amount[part])]) for part in parts if part.size]


def _panel(slice_: npt.NDArray[np.float32], aspect: float) -> Image.Image:
    """A slice, white = 1, fitted into a square; `aspect` is the height of a voxel over its width."""
    grey = Image.fromarray((np.clip(slice_, 0, 1) * 255).astype(np.uint8))
    rows, columns = slice_.shape[0] * aspect, float(slice_.shape[1])
    scale = PANEL_PIXELS / max(rows, columns)
    fitted = grey.resize((max(1, round(columns * scale)), max(1, round(rows * scale))), Image.Resampling.BILINEAR)
    panel = Image.new("L", (PANEL_PIXELS, PANEL_PIXELS), 0)
    panel.paste(fitted, ((PANEL_PIXELS - fitted.width) // 2, (PANEL_PIXELS - fitted.height) // 2))
    return panel
