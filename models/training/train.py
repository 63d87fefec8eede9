"""Training: a fixed, seeded schedule over simulated patches, resumable at any checkpoint.

Hides the optimiser, the schedule (constant, then a linear decay over the last fifth, so that a run can be extended)
and the loss. Writes config.json, log.csv and checkpoint.pt beside each other. Must never look at an evaluation study.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.training.network import VARIANTS, Network
from models.training.samples import Sample, draw_patch, make_sample, stream

TRAIN_SEED, VALIDATION_SEED = 1_000_000, 900_000_000  # of phantoms; evaluation draws from yet another range


@dataclass(frozen=True)
class Config:
    """What a run depends on."""

    variant: str = "small"
    steps: int = 2000
    batch: int = 2
    patch: int = 40
    rate: float = 1e-3
    keep: int = 200  # simulated blocks held at a time
    refresh: int = 10  # steps between two new blocks
    validation: int = 12
    ema: float = 0.998
    seed: int = 1


PRESETS = {
    "smoke": Config(steps=6, batch=1, patch=24, keep=2, refresh=3, validation=1),
    "small-cpu": Config(),
    "base-gpu": Config(variant="base", steps=40000, batch=16, patch=64, keep=800, refresh=1, validation=24),
}


@dataclass
class _Run:
    network: Network
    average: Network
    optimizer: torch.optim.Optimizer
    step: int = 0


def train(
    config: Config, out: Path, *, workers: int = 1, every: int = 250, report: Callable[[str], None] = print
) -> Path:
    """Train, or go on from `out/checkpoint.pt`.

    Args:
        config: the run; only `steps` may differ from an earlier part of the same run.
        out: folder of the run.
        workers: processes that simulate.
        every: steps between checkpoints and validations.
        report: told one line per validation.

    Returns:
        Path of the checkpoint.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = _start(config, out)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
    validation = [s for s in (make_sample(VALIDATION_SEED + n) for n in range(config.validation)) if s is not None]
    samples = stream(TRAIN_SEED * config.seed + 10 * run.step, workers)
    held = [next(samples) for _ in range(min(16, config.keep))]
    began, losses = time.monotonic(), []
    while run.step < config.steps:
        if run.step % config.refresh == 0:
            held = [*held[-(config.keep - 1) :], next(samples)]
        losses.append(_step(run, config, held))
        if run.step % every == 0 or run.step == config.steps:
            row = {"step": run.step, "loss": float(np.mean(losses)), "minutes": (time.monotonic() - began) / 60}
            row |= validate(run.average, validation)
            _save(run, config, out, row)
            report(" ".join(f"{name} {value:.4g}" for name, value in row.items()))
            losses = []
    samples.close()  # type: ignore[attr-defined]
    return out / "checkpoint.pt"


def _start(config: Config, out: Path) -> _Run:
    torch.manual_seed(config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, average = (Network(VARIANTS[config.variant]).to(device) for _ in range(2))
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    average.load_state_dict(network.state_dict())
    run = _Run(network, average, torch.optim.AdamW(network.parameters(), lr=config.rate, weight_decay=1e-4))
    path = out / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if replace(Config(**saved["config"]), steps=config.steps) != config:
            raise ValueError("the checkpoint belongs to another configuration")
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.step = saved["step"]
    return run


def _save(run: _Run, config: Config, out: Path, row: dict[str, float]) -> None:
    state: dict[str, Any] = {
        "config": asdict(config),
        "step": run.step,
        "network": run.network.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    torch.save(state, out / "checkpoint.tmp")
    (out / "checkpoint.tmp").replace(out / "checkpoint.pt")
    new = not (out / "log.csv").exists()
    with (out / "log.csv").open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def _step(run: _Run, config: Config, held: list[Sample]) -> float:
    """One optimiser step; what it draws depends only on the seed and the step."""
    rng = np.random.default_rng([config.seed, run.step])
    device = next(run.network.parameters()).device
    patches = [draw_patch(held[int(rng.integers(len(held)))], config.patch, rng) for _ in range(config.batch)]
    images, truth, brain, condition = (
        torch.from_numpy(np.stack(part)).to(device) for part in zip(*patches, strict=True)
    )
    images = images.contiguous(memory_format=torch.channels_last_3d)
    for group in run.optimizer.param_groups:
        group["lr"] = config.rate * _schedule(run.step, config.steps)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        raw, bound = run.network.unbounded(images, condition)
    value = loss(raw.float(), bound.float(), truth, brain)
    run.optimizer.zero_grad(set_to_none=True)
    value.backward()
    torch.nn.utils.clip_grad_norm_(run.network.parameters(), 0.5)
    run.optimizer.step()
    run.step += 1
    decay = min(config.ema, run.step / (run.step + 20))
    with torch.no_grad():
        for slow, fast in zip(run.average.parameters(), run.network.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)
    return float(value.detach())


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 200, max(0.01, (steps - step) / (0.2 * steps)))


def loss(raw: Tensor, bound: Tensor, truth: Tensor, brain: Tensor) -> Tensor:
    """Charbonnier error of the bounded signal, heavier where it enhances, plus bias and what exceeds the bound.

    Errors are divided by sqrt(1 + truth), so that vessels do not drown weak lesions. The error over enhancing voxels is
    also averaged over 4x4x4 blocks before its size is taken: noise averages out there and a systematic loss of signal
    does not, which keeps the slope near 1. Outside the brain errors count a third.

    Args:
        raw: prediction before the bound.
        bound: the bound.
        truth: contrast enhancement of the standard dose.
        brain: 1 inside the brain; all (n, 1, k, j, i).
    """
    scale = torch.rsqrt(1 + truth)
    error = (torch.minimum(raw, bound) - truth) * scale
    enhancing = torch.clamp(truth / 0.1, 0, 1)
    weight = (1 + 10 * enhancing) * (0.3 + 0.7 * brain)
    robust = torch.sqrt(error**2 + 4e-4) - 0.02
    bias = functional.avg_pool3d(error * enhancing, 4).abs()
    excess = functional.relu(raw - bound) * scale
    return torch.mean(weight * robust) + 20 * torch.mean(bias) + 0.1 * torch.mean(excess)


@torch.no_grad()
def validate(network: Network, samples: list[Sample]) -> dict[str, float]:
    """Mean over validation blocks: CE error and slope in enhancing brain, quiet voxels above 0.1 per thousand."""
    device = next(network.parameters()).device
    rows = []
    for sample in samples:
        images = torch.from_numpy(sample.images.astype(np.float32))[None].to(device)
        y = network(images, torch.from_numpy(sample.condition)[None].to(device))[0, 0].cpu().numpy()
        truth = sample.truth.astype(np.float32)
        enhancing, quiet = sample.brain & (truth > 0.1), sample.brain & (truth < 0.01)
        if enhancing.sum() < 50:
            continue
        slope = np.polyfit(truth[enhancing], y[enhancing], 1)[0]
        rows.append((np.abs(y - truth)[enhancing].mean(), slope, np.mean(y[quiet] > 0.1) * 1000))
    names = ("ce_error", "slope", "false_per_mille")
    return {name: float(np.mean(column)) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
