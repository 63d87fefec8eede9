"""The watermark: words burned into the background of a derived image, which a print or a screenshot keeps.

Hides where the head is and where there is room for text. Must never cover a voxel of the head, or one to which signal
was added: where there is no room, there is no watermark.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from models.volume import Mask, Volume

NOTE = "SYNTHETIC, and NOT ACQUIRED where there is room, is burned in outside the head."
HEAD_LEVEL = 0.1  # of the brightest tissue; air stays below, even as noise, once it is averaged
MARGIN_MM = 5.0  # kept clear around the head
EDGE_PIXELS = 2  # kept clear at the border of the image
PIXELS_PER_SCALE = 384  # one more size of letters for so many pixels of the longer side
_LAYOUTS = (
    ("SYNTHETIC - NOT ACQUIRED",),
    ("SYNTHETIC", "NOT ACQUIRED"),
    ("SYNTHETIC", "NOT", "ACQUIRED"),
    ("SYNTHETIC",),
)

Plane = npt.NDArray[np.bool_]  # (row, column)


def find_head(volume: Volume) -> Mask:
    """Everything that is not air, with a margin (k, j, i); rather too much than too little.

    Intensities are averaged over 3 x 3 x 3 voxels, compared with a tenth of the brightest tissue, and filled.
    """
    tissue = volume.voxels[volume.voxels > 0]
    if tissue.size == 0:
        return np.zeros(volume.voxels.shape, bool)
    smooth = ndimage.uniform_filter(np.abs(volume.voxels), 3, mode="nearest")
    head = smooth > HEAD_LEVEL * float(np.quantile(tissue, 0.99))
    head = np.stack([ndimage.binary_fill_holes(one) for one in head])
    if not head.any():
        return head
    near: Mask = ndimage.distance_transform_edt(~head, sampling=volume.spacing_mm[::-1]) <= MARGIN_MM
    return near


def place(occupied: Mask) -> Mask:
    """Where the letters go (k, j, i): the same place in all slices, or else in each slice the place that it has.

    Args:
        occupied: what must not be covered.
    """
    text = _place_in_plane(np.asarray(occupied.any(axis=0)))
    if text is not None:
        return np.broadcast_to(text, occupied.shape)
    empty = np.zeros(occupied.shape[1:], bool)
    return np.stack([empty if found is None else found for found in map(_place_in_plane, occupied)])


def _place_in_plane(occupied: Plane) -> Plane | None:
    """The largest letters that fit, upright before turned, nearest to a corner; None where nothing fits."""
    for scale in range(1 + max(occupied.shape) // PIXELS_PER_SCALE, 0, -1):
        for lines, turns in itertools.product(_LAYOUTS, (0, 1)):
            letters = np.rot90(_letters(lines, scale), turns)
            corner = _room(occupied, letters.shape)
            if corner is not None:
                text = np.zeros(occupied.shape, bool)
                text[corner[0] : corner[0] + letters.shape[0], corner[1] : corner[1] + letters.shape[1]] = letters
                return text
    return None


def _letters(lines: tuple[str, ...], scale: int) -> Plane:
    """The text in a bitmap font that is the same everywhere, each point `scale` pixels wide."""
    font = ImageFont.load_default_imagefont()
    width, height = (int(max(font.getbbox(line)[side] for line in lines)) for side in (2, 3))
    image = Image.new("1", (width, height * len(lines)))
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, number * height), line, fill=1, font=font)
    points = np.array(image)
    rows, columns = np.flatnonzero(points.any(axis=1)), np.flatnonzero(points.any(axis=0))
    points = points[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.kron(points, np.ones((scale, scale), bool)).astype(bool)


def _room(occupied: Plane, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The upper left corner of a free box, as near to a corner of the image as there is one."""
    inner = occupied[EDGE_PIXELS:-EDGE_PIXELS, EDGE_PIXELS:-EDGE_PIXELS]
    height, width = shape
    if height > inner.shape[0] or width > inner.shape[1]:
        return None
    counts = np.pad(inner.cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
    inside = counts[height:, width:] - counts[:-height, width:] - counts[height:, :-width] + counts[:-height, :-width]
    rows, columns = np.nonzero(inside == 0)
    if rows.size == 0:
        return None
    from_edge = [np.minimum(at, size - 1 - at) for at, size in zip((rows, columns), inside.shape, strict=True)]
    best = int((from_edge[0] + from_edge[1]).argmin())
    return int(rows[best]) + EDGE_PIXELS, int(columns[best]) + EDGE_PIXELS
