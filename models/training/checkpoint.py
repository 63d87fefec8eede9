"""A training run as a file: checkpoint.pt, read by the names of today whatever wrote it.

Hides the format (`config`, fields of `models.training.train.Config`; `step`; `network` and `average`, its weights and
their exponential moving average; `optimizer`) and what older files call by other names. Must never load more than
numbers and plain values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# From the names in files written before December 2026 (the weights to start from among them) to those of today.
_WEIGHTS = {"enter": "encoder", "leave": "decoder", "told": "auxiliary_heads", "modulate": "film"}  # parts of a name
_CONFIG = {"rate": "learning_rate"}


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a checkpoint holds, its tensors on `device`."""
    saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    saved["config"] = {_CONFIG.get(name, name): value for name, value in saved["config"].items()}
    for weights in {"network", "average"} & {*saved}:
        saved[weights] = _renamed(saved[weights])
    return saved


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(path)


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {".".join(_WEIGHTS.get(part, part) for part in name.split(".")): value for name, value in weights.items()}
