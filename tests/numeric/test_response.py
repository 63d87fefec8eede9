"""The dose response: what its voxels are, and what it learns from them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files

import numpy as np
import pytest
import torch
from torch import Tensor

from models.condition import DOSE_INDEX, DOSE_KNOWN_INDEX, HEADROOM, NAMES
from models.training.export import load_network
from models.training.network import DoseResponse, dose_fraction
from models.training.patches import GAPS
from models.training.response import VOXELS, _drawn, draw_voxels, learned

LEARNED, FEW = 2000, 200  # acquisitions


@pytest.fixture(scope="module")
def response() -> DoseResponse:
    return learned(1, LEARNED)[0]


@pytest.fixture(scope="module")
def shipped() -> DoseResponse:
    with as_file(files("models.training") / "start" / "small-tune.pt") as path:
        return load_network(path)[0].response


def voxels(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Signals in proportion, pre-contrast signals and truths, (n, 1, VOXELS, 1, 1) each, and conditions."""
    drawn, condition = (torch.from_numpy(part) for part in _drawn(seed, count, 1))
    subtraction, pre, truth = drawn[..., None, None].split(1, dim=1)
    return subtraction / dose_fraction(condition)[:, None, None, None, None], pre, truth, condition


def errors(response: DoseResponse, header: Callable[[Tensor], Tensor] = lambda known: known) -> tuple[float, float]:
    """Mean error where the standard dose enhances, of the response and of proportion, on voxels of another seed."""
    proportional, pre, truth, known = voxels(2, FEW)
    told = header(known)
    proportional = proportional * (dose_fraction(known) / dose_fraction(told))[:, None, None, None, None]
    seen = truth > 0.1
    with torch.no_grad():
        answer = response(proportional, pre, told)
    return float((answer - truth).abs()[seen].mean()), float((proportional - truth).abs()[seen].mean())


def test_an_unlearned_response_is_proportion() -> None:
    proportional, pre, _, condition = voxels(3, 4)
    assert torch.equal(DoseResponse()(proportional, pre, condition), proportional)


def test_a_response_is_nearer_the_standard_dose_than_proportion_in_acquisitions_it_has_not_seen(
    response: DoseResponse, shipped: DoseResponse
) -> None:
    for one in (response, shipped):
        told, proportional = errors(one)
        assert told < 0.8 * proportional


def test_what_a_header_tells_is_what_the_response_goes_by(response: DoseResponse) -> None:
    told, _ = errors(response)
    dose = slice(DOSE_INDEX, DOSE_KNOWN_INDEX + 1)

    def others(known: Tensor) -> Tensor:
        mixed = known.roll(1, dims=0)
        mixed[:, dose] = known[:, dose]
        return mixed

    assert errors(response, others)[0] > 1.1 * told


def test_where_nothing_is_told_it_still_errs_less_than_proportion(response: DoseResponse) -> None:
    told, proportional = errors(learned(1, LEARNED, told=False)[0], torch.zeros_like)
    assert told < 0.9 * proportional
    assert errors(response, torch.zeros_like)[0] != told  # a network without conditions has its own


@pytest.mark.parametrize("gap", [*GAPS, []], ids=str)
def test_more_signal_never_means_less_of_it_nor_more_than_the_bound_leaves_room_for(
    shipped: DoseResponse, gap: list[int]
) -> None:
    *_, condition = voxels(2, FEW)
    condition[:, gap] = 0
    proportional = torch.linspace(-1, 2, 61)[None, None, :, None, None].expand(FEW, 1, 61, 1, 1)
    for bright in (0.0, 0.5, 1.0, 1.3, 4.0):
        with torch.no_grad():
            out = shipped(proportional, torch.full_like(proportional, bright), condition)
        assert torch.equal(out.sign(), proportional.sign())
        assert (out.abs() <= HEADROOM * proportional.abs() + 1e-5).all()
        assert (out.diff(dim=2) > -1e-3).all()


def test_voxels_follow_from_the_seed_and_their_number_whoever_draws_them() -> None:
    alone, shared = _drawn(5, 600, 1), _drawn(5, 600, 2)
    for one, other in zip(alone, shared, strict=True):
        assert np.array_equal(one, other)
    assert not np.array_equal(draw_voxels(5, 1)[0], draw_voxels(6, 1)[0])


def test_a_low_dose_enhances_a_voxel_less_than_the_standard_dose() -> None:
    for index in range(40):
        (subtraction, pre, truth), condition = draw_voxels(7, index)
        assert subtraction.shape == (VOXELS,)
        assert condition.shape == (len(NAMES),)
        assert (pre >= 0).all()
        assert condition[DOSE_KNOWN_INDEX] == 1
        strong = truth > 0.2
        assert (subtraction[strong] <= truth[strong] + 1e-5).all()
