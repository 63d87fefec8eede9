"""One network from several runs: the mean of their weights (each run's EMA), where the runs began at one network.

Hides which runs may be averaged and what the card says of it. Must never average networks that were told other things,
that learned from a site, or that have different dose responses. Runs from one start stay in one basin of the loss, and
so does their mean (Wortsman et al., "Model soups", arXiv 2203.05482); of runs from different starts it is no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from models.training import checkpoint
from models.training.network import RESPONSE

APART = 0.5  # distance of two sets of weights over the length of the first; strangers have about 1.4


def average(checkpoints: Sequence[Path], out: Path) -> None:
    """Write a checkpoint with the mean of the averaged weights of runs.

    It has the configuration of the first run; its data tell of the others. It holds no state of an optimiser: it is a
    start for training, or to be exported.

    Args:
        checkpoints: of `models.training.train`, at least two, of one variant, on simulated studies.
        out: the checkpoint to write; never replaced.

    Raises:
        ValueError: `out` exists, there are fewer than two, one is given twice, or they do not fit together.
    """
    if out.exists():
        raise ValueError(f"{out} exists")
    if len({path.resolve() for path in checkpoints}) < max(2, len(checkpoints)):
        raise ValueError("an average needs at least two checkpoints, none of them twice")
    runs = [checkpoint.read(path) for path in checkpoints]
    first, *others = runs
    for path, run in zip(checkpoints, runs, strict=True):
        if "site" in _data(run):
            raise ValueError(f"{path} learned from a site's studies: the card could not tell whose they are")
        if _kind(run) != _kind(first):
            raise ValueError(f"{path} is another kind of network than {checkpoints[0]}")
        if not _same_response(first, run):
            raise ValueError(f"{path} learned another dose response than {checkpoints[0]}")
        if not _distance(first, run) < APART:  # nor where it is not a number
            raise ValueError(f"{path} did not start from where {checkpoints[0]} did")
    weights = {
        name: torch.stack([run["average"][name].float() for run in runs]).mean(dim=0) for name in first["average"]
    }
    learned, comma, earlier = _data(first).partition(",")
    named = ", ".join(f"{run['step']} steps of seed {run['config']['seed']}" for run in others)
    data = f"{learned}, weights averaged with those of {len(others)} more ({named}){comma}{earlier}"
    checkpoint.write(out, {"config": first["config"] | {"data": data}, "step": first["step"], "average": weights})


def _data(run: dict[str, Any]) -> str:
    return str(run["config"].get("data", "simulated"))


def _kind(run: dict[str, Any]) -> tuple[str, bool, str, dict[str, torch.Size]]:
    """Variant, whether it is told the acquisition, its target, and the shapes of its weights."""
    config = run["config"]
    shapes = {name: weight.shape for name, weight in run["average"].items()}
    return config["variant"], config.get("conditioned", True), config.get("target", "truth"), shapes


def _same_response(one: dict[str, Any], other: dict[str, Any]) -> bool:
    names = [name for name in one["average"] if name.startswith(RESPONSE)]
    return all(torch.equal(one["average"][name].float(), other["average"][name].float()) for name in names)


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    names = [name for name in one["average"] if not name.startswith(RESPONSE)]  # not every file has one order
    here, there = (torch.cat([run["average"][name].float().ravel() for name in names]) for run in (one, other))
    return float(torch.linalg.norm(there - here) / torch.linalg.norm(here))
