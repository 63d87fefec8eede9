"""The watermark: in the background, the same everywhere, and never on the head."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.volume import Mask, Volume
from worker.compose.watermark import MARGIN_MM, find_head, place


def ball(size: int, radius: float, noise: float = 0.0) -> Volume:
    """A bright ball in noisy air (Rician, as of magnitude images)."""
    k, j, i = np.meshgrid(np.arange(12), np.arange(size), np.arange(size), indexing="ij")
    inside = (k - 6) ** 2 * 16 + (j - size / 2) ** 2 + (i - size / 2) ** 2 < radius**2
    rng = np.random.default_rng(0)
    voxels = np.hypot(inside * 100.0 + rng.normal(0, noise, inside.shape), rng.normal(0, noise, inside.shape))
    return Volume(voxels.astype(np.float32), np.diag([1.0, 1.0, 4.0, 1.0]))


@pytest.mark.parametrize("noise", [0.0, 2.0, 5.0])
def test_the_same_letters_stand_in_every_slice_clear_of_the_head(noise: float) -> None:
    volume = ball(256, 90, noise)
    text = place(find_head(volume))
    assert text.any()
    assert (text == text[0]).all()
    rows, columns = np.nonzero(text[0])
    assert np.hypot(rows - 128, columns - 128).min() > 90 + MARGIN_MM - 2


def test_where_slices_have_no_place_in_common_each_has_its_own() -> None:
    occupied = np.zeros((2, 64, 256), bool)
    occupied[0, :32], occupied[1, 32:] = True, True
    text = place(occupied)
    assert text.any(axis=(1, 2)).all()
    assert not (text & occupied).any()


def test_a_narrow_image_gets_turned_or_fewer_words() -> None:
    occupied = np.zeros((1, 180, 120), bool)
    occupied[0, 12:-12, 14:-14] = True
    rows, columns = np.nonzero(place(occupied)[0])
    assert np.ptp(rows) > 100
    assert np.ptp(columns) < 10
    occupied[0, :90] = occupied[0, 150:] = True
    rows, _ = np.nonzero(place(occupied)[0])
    assert 40 < np.ptp(rows) < 60


def test_without_room_there_is_no_watermark() -> None:
    assert not place(np.ones((3, 256, 256), bool)).any()
    assert not place(np.zeros((3, 6, 40), bool)).any()


def test_an_empty_volume_has_no_head() -> None:
    volume = ball(256, 90)
    assert not find_head(volume.with_voxels(np.zeros_like(volume.voxels))).any()


def test_a_larger_matrix_gets_larger_letters() -> None:
    heights = [int(np.ptp(np.nonzero(place(np.zeros((1, size, size), bool))[0])[0])) for size in (256, 512, 1024)]
    assert heights[0] < heights[1] < heights[2]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 200), st.integers(8, 200), st.floats(0, 0.01))
def test_no_letter_ever_covers_what_is_occupied(seed: int, rows: int, columns: int, share: float) -> None:
    occupied: Mask = np.random.default_rng(seed).random((3, rows, columns)) < share
    assert not (place(occupied) & occupied).any()
