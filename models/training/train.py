"""Training: a fixed, seeded schedule over patches, simulated or a site's own, resumable at any checkpoint.

Hides the optimiser, the schedule of the learning rate (a warm-up, constant, then a linear decay over the last fifth, so
that a run can be extended), the loss and the exponential moving average (EMA) of the weights, which is what a run is
for. Writes config.json, log.csv and checkpoint.pt beside each other. Must never look at an evaluation study.
"""

from __future__ import annotations

import csv
import hashlib
import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.card import STARTED
from models.simulation.samples import TRAIN_SEED, VALIDATION_SEED, Block, make_sample, stream
from models.statistics import ENHANCING
from models.training import checkpoint
from models.training.network import FULL_RESOLUTION, RESPONSE, STRIDE, VARIANTS, Network
from models.training.patches import Held, draw_batch
from models.training.response import learned
from models.training.site import SiteData, cut, padded, simulated_block

# Weights and scales of the loss: chosen, but where an ADR is named.
FALSE_FIRST, FALSE_WEIGHT = 10.0, 40.0  # of false enhancement: at first, lest every gate shuts for good, and in full
FALSE_FROM = 0.05  # of white matter: signal in quiet brain that is false; half of what counts as enhancing
AUXILIARY_WEIGHT = 0.5  # of the auxiliary heads; why there are any: ADR 15
BIAS_WEIGHT, BIAS_SIDE = 8.0, 4  # of the error over blocks of so many voxels a side
EXCESS_WEIGHT = 0.1  # of what exceeds the bound, which takes its gradient away
SLOPE_WEIGHT, SLOPE_DAMPING = 0.1, 20.0  # of the slope; the spread of a patch's enhancement below which it counts less
CHARBONNIER = 0.02  # of white matter: smaller errors count as their squares, larger ones as their size
ENHANCING_WEIGHT = 4.0  # of the error of an enhancing voxel, beside the 1 of any
OUTSIDE_WEIGHT = 0.3  # of the error outside the brain: a third
# The optimiser, chosen likewise.
LARGEST_GRADIENT = 0.5  # norm to which the gradient of a step is cut
WEIGHT_DECAY = 1e-4
EMA_WARM_UP = 20  # steps: the decay after n of them is n / (n + 20), up to `Config.ema`, so that the start is forgotten
DECAYING_SHARE, LEAST_RATE = 0.2, 0.01  # last share of the steps, over which the learning rate falls to this share
RESPONSE_SEED = 1  # of the voxels whose dose response a run learns: the same for all runs, which can so be averaged
LAST_SEED = 400  # a seed has a million phantoms from TRAIN_SEED times itself on, all before TEST_SEED
VALIDATION_SIDE = 96  # voxels of the blocks in which a site's held-out study is judged
TARGETS: dict[str, Callable[[int], Block | None]] = {  # what the truth of a simulated study is
    "truth": make_sample,  # contrast enhancement without noise, which no scanner can measure
    "masked": partial(simulated_block, masked=True),  # what a site has, and the paper makes of it
    "measured": partial(simulated_block, masked=False),  # what a site has
}


@dataclass(frozen=True)
class Config:
    """What a run depends on."""

    variant: str = "small"
    preset: str = ""  # that the run was set up from, for its card
    conditioned: bool = True  # else nothing of the acquisition is told: the baseline of conditioning
    target: str = "truth"  # one of TARGETS; a site's own studies have theirs
    steps: int = 7000
    batch: int = 2
    patch: int = 40
    learning_rate: float = 1e-3
    full_share: float = 1.0  # of that at full resolution; at 0 its weights stay, and only `auxiliary_loss` is learned
    warm_up: int = 200  # steps over which the learning rate rises
    loss_offset: float = 0.0  # gate offset for `loss` and `validate`, and for export unless another is chosen
    false_full_at: int = 3000  # steps over which the weight of false enhancement rises; in full at once if 0
    acquisitions: int = 60_000  # of whose voxels the dose response is learned, unless the start of a run has it
    fill: int = 16  # blocks simulated before the first step
    keep: int = 200  # simulated blocks held at a time
    refresh: int = 24  # steps between two new blocks
    validation: int = 8
    ema: float = 0.998  # decay of the exponential moving average of the weights, in a step
    seed: int = 1
    mixed: bool = True  # bfloat16 convolutions: twice as fast on a GPU or a CPU that has them, slower on others
    data: str = "simulated"  # what the network learned from, for its card; written by `train`
    start: str = ""  # SHA-256 of the checkpoint that the first step started from


PRESETS = {
    "smoke": Config(acquisitions=200, steps=6, batch=1, patch=24, keep=2, refresh=3, validation=1, mixed=False),
    "small-cpu": Config(),
    "small-gpu": Config(steps=15100, batch=16, patch=48, keep=1000, refresh=14, validation=16),
    "small-tune": Config(  # goes on from the averaged weights of another run
        steps=900,
        batch=3,
        patch=64,
        learning_rate=5e-4,
        full_share=0.6,
        warm_up=30,
        loss_offset=4.0,
        false_full_at=0,
        fill=390,
        keep=400,
        refresh=2,
        ema=0.995,
        seed=18,
    ),
    "base-gpu": Config(  # 7.6 times the arithmetic of a step of small-gpu; not run yet
        variant="base", steps=12000, batch=16, patch=64, keep=1000, refresh=4, validation=24
    ),
}


@dataclass
class _Run:
    network: Network
    average: Network  # with the exponential moving average of its weights
    optimizer: torch.optim.Optimizer
    device: torch.device
    step: int = 0

    def hold(self, block: Block) -> Held:
        """The block where this run trains."""
        return Held(block, self.device)


def train(
    config: Config,
    out: Path,
    *,
    workers: int = 1,
    every: int = 250,
    report: Callable[[str], None] = print,
    source: SiteData | None = None,
    start: Path | None = None,
) -> Path:
    """Train, or go on from `out/checkpoint.pt`.

    Args:
        config: the run; only `steps` may differ from an earlier part of the same run.
        out: folder of the run.
        workers: processes that simulate.
        every: steps between checkpoints and validations.
        report: told one line per validation.
        source: a site's studies; simulated ones where None.
        start: checkpoint whose averaged weights a new run starts from.

    Returns:
        Path of the checkpoint.

    Raises:
        ValueError: the seed is out of range, the target is unknown or not a site's, or a checkpoint belongs to another
            configuration, variant or architecture, or never learned from the conditions that this run is told.
    """
    check(config, site=source is not None)
    out.mkdir(parents=True, exist_ok=True)
    config = _stated(config, source, start)
    run = _start(config, out, start, workers, report)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
    held, fresh, validation = _studies(run, config, source, workers)
    began, losses = time.monotonic(), []
    while run.step < config.steps:
        if fresh and run.step % config.refresh == 0:
            held = [*held[-(config.keep - 1) :], run.hold(next(fresh))]
        losses.append(_step(run, config, held))
        if run.step % every == 0 or run.step == config.steps:
            row = {
                "step": run.step,
                "loss": float(torch.stack(losses).mean()),
                "minutes": (time.monotonic() - began) / 60,
            }
            row |= validate(run.average, validation)
            _save(run, config, out, row)
            report(" ".join(f"{name} {value:.4g}" for name, value in row.items()))
            losses = []
    if fresh:
        fresh.close()
    return out / "checkpoint.pt"


def _studies(
    run: _Run, config: Config, source: SiteData | None, workers: int
) -> tuple[list[Held], Generator[Block, None, None] | None, list[Block]]:
    """The studies to start with, where more come from if any do, and those that judge."""
    if source:
        training = [run.hold(padded(one, config.patch)) for one in source.training]
        return training, None, [piece for one in source.validation for piece in cut(one, VALIDATION_SIDE, STRIDE)]
    fresh = stream(TRAIN_SEED * config.seed + 10 * run.step, workers, TARGETS[config.target])
    held = [run.hold(next(fresh)) for _ in range(min(config.fill, config.keep))]
    with closing(stream(VALIDATION_SEED, workers)) as judged:
        return held, fresh, list(islice(judged, config.validation))


def check(config: Config, *, site: bool) -> None:
    """Refuse what no run can be, before any study is read.

    Args:
        config: the run.
        site: whether it learns from a site's studies.

    Raises:
        ValueError: the seed is out of range, the loss offset negative, no acquisition to be drawn, or the target
            unknown or not a site's.
    """
    if not 1 <= config.seed <= LAST_SEED:
        raise ValueError(f"the seed must be from 1 to {LAST_SEED}: others would meet evaluation studies")
    if config.target not in TARGETS:
        raise ValueError(f"known targets: {', '.join(TARGETS)}")
    if config.acquisitions < 1:
        raise ValueError(f"no dose response is learned from {config.acquisitions} acquisitions")
    if config.loss_offset < 0:
        raise ValueError(f"a loss offset of {config.loss_offset:g} is negative: the gate would open of itself")
    if site and config.target != "truth":
        raise ValueError("the target is chosen for simulated studies: a site's is what it measured, masked")


def _stated(config: Config, source: SiteData | None, start: Path | None) -> Config:
    """The configuration with what the network learned from, first to last."""
    data, digest = source.summary if source else "simulated", ""
    if not config.full_share:
        data += ", coarse levels alone"
    if config.target != "truth":
        data += f", target: the standard dose as acquired{', masked' if config.target == 'masked' else ''}"
    if not config.conditioned:
        data += ", nothing of the acquisition told"
    saved = checkpoint.read(start) if start else None
    if (source or saved) and not _answered(config, saved):  # what "simulated" stands for tells it by itself
        data += ", given a dose response by the signal equations"
    if start and saved:
        earlier = saved["config"]
        if earlier["variant"] != config.variant:
            raise ValueError(f"{start} holds the variant {earlier['variant']}, this run is of {config.variant}")
        if config.conditioned and not earlier.get("conditioned", True):
            raise ValueError(f"{start} was told nothing of the acquisition, this run is: only the reverse is possible")
        data = f"{data}{STARTED}{saved['step']} steps on: {earlier.get('data', 'simulated')}"
        digest = hashlib.sha256(start.read_bytes()).hexdigest()
    return replace(config, data=data, start=digest)


def _answered(config: Config, start: dict[str, Any] | None) -> bool:
    """Whether the checkpoint that a run starts from has a dose response for what this run is told."""
    return start is not None and config.conditioned == start["config"].get("conditioned", True)


def _start(
    config: Config, out: Path, start: Path | None, workers: int = 1, report: Callable[[str], None] = print
) -> _Run:
    """A run at its first step, or where its checkpoint left it."""
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # all patches of a run are of one size
    network, average = (Network(VARIANTS[config.variant], conditioned=config.conditioned).to(device) for _ in range(2))
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    network.gate_offset = average.gate_offset = config.loss_offset
    run = _Run(network, average, _optimizer(network, config), device)
    if (out / "checkpoint.pt").exists():
        _resume(run, config, checkpoint.read(out / "checkpoint.pt", device))
    else:
        saved = checkpoint.read(start, device) if start else None
        if saved:
            network.take(saved["average"])
        if not _answered(config, saved):
            response, ratio = learned(
                RESPONSE_SEED, config.acquisitions, told=config.conditioned, workers=workers, device=device
            )
            report(f"dose response: {ratio:.2f} of the error of proportion")
            network.response.load_state_dict(response.state_dict())
        average.load_state_dict(network.state_dict())
    network.response.requires_grad_(False)  # studies show too few acquisitions to learn it from (ADR 15)
    return run


def _optimizer(network: Network, config: Config) -> torch.optim.Optimizer:
    """AdamW with two groups of weights: the coarse levels, and the full resolution with its share of the rate."""
    full = [weight for name, weight in network.named_parameters() if name.startswith(FULL_RESOLUTION)]
    for weight in full:
        weight.requires_grad_(config.full_share > 0)
    apart = (*FULL_RESOLUTION, RESPONSE)
    coarse = [weight for name, weight in network.named_parameters() if not name.startswith(apart)]
    groups = [{"params": coarse, "share": 1.0}, {"params": full, "share": config.full_share}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=WEIGHT_DECAY)


def _resume(run: _Run, config: Config, saved: dict[str, Any]) -> None:
    """Go on from a checkpoint of the same run."""
    if replace(Config(**saved["config"]), steps=config.steps) != config:
        raise ValueError("the checkpoint belongs to another configuration")
    run.network.take(saved["network"])
    run.average.take(saved["average"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.step = saved["step"]


def _save(run: _Run, config: Config, out: Path, row: dict[str, float]) -> None:
    state: dict[str, Any] = {
        "config": asdict(config),
        "step": run.step,
        "network": run.network.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    checkpoint.write(out / "checkpoint.pt", state)
    new = not (out / "log.csv").exists()
    with (out / "log.csv").open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def _step(run: _Run, config: Config, held: list[Held]) -> Tensor:
    """One optimiser step; what it draws depends only on the seed and the step."""
    rng = np.random.default_rng([config.seed, run.step])
    layers, condition = draw_batch(held, config.batch, config.patch, rng)
    images, targets = layers[:, :3].contiguous(memory_format=torch.channels_last_3d), layers[:, 3:]
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * group["share"] * _schedule(run.step, config)
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=config.mixed):
        parts = run.network.parts(images, condition)
    value = AUXILIARY_WEIGHT * auxiliary_loss(parts.auxiliary, targets)
    if config.full_share:
        signal, gate, offset_share, bound = (part.float() for part in parts[:4])
        risen = min(1.0, run.step / config.false_full_at) if config.false_full_at else 1.0
        false_weight = FALSE_FIRST + (FALSE_WEIGHT - FALSE_FIRST) * risen
        regions = targets.split(1, dim=1)
        raw = run.network.opened(signal, gate, offset_share)
        value = value + loss(raw, bound, *regions, false_weight=false_weight)
        value = value + gate_loss(gate, *regions)
    run.optimizer.zero_grad(set_to_none=True)
    value.backward()
    torch.nn.utils.clip_grad_norm_(run.network.parameters(), LARGEST_GRADIENT)
    run.optimizer.step()
    run.step += 1
    decay = min(config.ema, run.step / (run.step + EMA_WARM_UP))
    get_ema_multi_avg_fn(decay)([*run.average.parameters()], [*run.network.parameters()], run.step)
    return value.detach()


def _schedule(step: int, config: Config) -> float:
    """Share of the learning rate at a step."""
    left = (config.steps - step) / (DECAYING_SHARE * config.steps)
    return min(1.0, (step + 1) / config.warm_up, max(LEAST_RATE, left))


def loss(
    raw: Tensor, bound: Tensor, truth: Tensor, brain: Tensor, quiet: Tensor, *, false_weight: float = FALSE_WEIGHT
) -> Tensor:
    """Charbonnier error of the bounded signal, heavier where it enhances, plus four terms against known failures.

    Errors are divided by sqrt(1 + truth), so that vessels do not drown weak lesions; outside the brain they count a
    third. Added are: the error over enhancing voxels averaged over blocks of `BIAS_SIDE` before its size is taken
    (noise averages out there, a systematic loss of signal does not); how far each patch's slope of prediction on truth
    is from 1 (the smallest mean error shrinks what is uncertain); signal above `FALSE_FROM` in quiet brain (false
    enhancement); and what exceeds the bound.

    Args:
        raw: prediction before the bound.
        bound: the bound.
        truth: contrast enhancement of the standard dose.
        brain: 1 inside the brain.
        quiet: 1 in brain where no signal belongs (`samples.quiet_brain`); all (n, 1, k, j, i).
        false_weight: of false enhancement; in full from the start it closes every gate for good.
    """
    y = torch.minimum(raw, bound)
    bias = functional.avg_pool3d(_scaled(y - truth, truth) * _enhancing(truth), BIAS_SIDE).abs()
    false = quiet * functional.relu(y - FALSE_FROM)
    excess = _scaled(functional.relu(raw - bound), truth)
    slope = _slope_error(y, truth, brain * _enhancing(truth))
    return (
        _weighted_error(y, truth, brain)
        + torch.mean(false_weight * false + EXCESS_WEIGHT * excess)
        + BIAS_WEIGHT * torch.mean(bias)
        + SLOPE_WEIGHT * slope
    )


def _weighted_error(y: Tensor, truth: Tensor, brain: Tensor) -> Tensor:
    """Mean of w (sqrt(e^2 + C^2) - C), the Charbonnier error, of e = (y - truth) / sqrt(1 + truth).

    The weight w is heavier where it enhances, and a third outside the brain.
    """
    weight = (1 + ENHANCING_WEIGHT * _enhancing(truth)) * (OUTSIDE_WEIGHT + (1 - OUTSIDE_WEIGHT) * brain)
    return torch.mean(weight * (torch.sqrt(_scaled(y - truth, truth) ** 2 + CHARBONNIER**2) - CHARBONNIER))


def _scaled(difference: Tensor, truth: Tensor) -> Tensor:
    return difference * torch.rsqrt(1 + truth)


def _enhancing(truth: Tensor) -> Tensor:
    """How much a voxel counts as enhancing; from ENHANCING on in full."""
    return torch.clamp(truth / ENHANCING, 0, 1)


def auxiliary_loss(auxiliary: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Deep supervision: error and cross-entropy of the auxiliary heads, against targets averaged to their resolution.

    Where the gradient of the coarse levels came through the full resolution alone, they faded or died before they were
    of use (ADR 15).

    Args:
        auxiliary: (n, 2, ...) at half and quarter resolution: signal, and logit of the chance that there is.
        targets: (n, 3, k, j, i): truth, brain and quiet brain, as in `loss`.
    """
    total = targets.new_zeros(())
    for fewer, said in zip((2, 4), auxiliary, strict=True):
        truth, brain, quiet = functional.avg_pool3d(targets, fewer).split(1, dim=1)
        signal, logit = said.float().split(1, dim=1)
        total = total + _weighted_error(signal, truth, brain) + gate_loss(logit, truth, brain, quiet)
    return total


def gate_loss(gate: Tensor, truth: Tensor, brain: Tensor, quiet: Tensor) -> Tensor:
    """Cross-entropy of the gate as a classifier: enhancement of the brain against its quiet parts.

    Through the signal alone a shut gate learns almost nothing: there its derivative vanishes (ADR 15).

    Args:
        gate: logit of the chance that a voxel enhances.
        truth: contrast enhancement of the standard dose; from ENHANCING on a voxel counts in full.
        brain: 1 inside the brain.
        quiet: 1 in brain where no signal belongs; what is neither does not count; all (n, 1, k, j, i).
    """
    return torch.mean(brain * _enhancing(truth) * functional.softplus(-gate) + quiet * functional.softplus(gate))


def _slope_error(y: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Mean over patches of |slope - 1| of the regression of y on truth: |cov(truth, y - truth)| / var(truth).

    Damped by `SLOPE_DAMPING` where a patch holds little or uniform enhancement.
    """
    over = (1, 2, 3, 4)
    total = weight.sum(over, keepdim=True) + 1e-3
    centred = (truth - (weight * truth).sum(over, keepdim=True) / total) * weight
    spread = (centred**2).sum(over)
    return torch.mean((centred * (y - truth)).sum(over).abs() / (spread + SLOPE_DAMPING))


@torch.no_grad()
def validate(network: Network, samples: list[Block]) -> dict[str, float]:
    """Mean over validation blocks: CE error and slope in enhancing brain, voxels that enhance per mL of quiet brain.

    NaN where no block holds both.
    """
    device = next(network.parameters()).device
    rows = []
    for sample in samples:
        images = torch.from_numpy(sample.images.astype(np.float32))[None].to(device)
        y = network(images, torch.from_numpy(sample.condition)[None].to(device))[0, 0].cpu().numpy()
        truth = sample.truth.astype(np.float32)
        enhancing = sample.brain & (truth > ENHANCING)
        if enhancing.sum() < 50 or not sample.quiet.any():
            continue
        slope = np.polyfit(truth[enhancing], y[enhancing], 1)[0]
        quiet_ml = sample.quiet.sum() * np.prod(sample.spacing_mm) / 1000
        rows.append((np.abs(y - truth)[enhancing].mean(), slope, (y[sample.quiet] > ENHANCING).sum() / quiet_ml))
    names = ("ce_error", "slope", "false_per_ml")
    means = np.mean(rows, axis=0) if rows else np.full(len(names), np.nan)
    return dict(zip(names, map(float, means), strict=True))
