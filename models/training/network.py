"""The conditional residual 3-D U-Net with its bounded output.

Hides the architecture: a learned dose response amplifies the subtraction, a U-Net decides what of it is shown, how
strongly. The graph itself computes an upper bound from the measured subtraction, so that whatever the weights are:
0 <= y <= G(dose) * max(z, z smoothed at three scales, 0), G(dose) = 1.5 / dose fraction.
No layer's statistics depend on the size of the input, so tiles and the whole volume agree. Must never use information
outside its two inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.condition import (
    DOSE_INDEX,
    DOSE_KNOWN_INDEX,
    HEADROOM,
    MEASURED,
    NAMES,
    UNKNOWN_DOSE_FRACTION,
)

CAP = 0.3  # of white matter: what a gate of 0 lets through at most
NEIGHBOURLY = 2.0  # how much further a gate opens than its own evidence says, where there is more beside it
CLEAR = 3.0  # signal-to-noise ratio, after smoothing, at which the logit of an untrained network's gate is 0
NOISE_LEFT = slice(NAMES.index("log_noise_left_1"), NAMES.index("log_noise_left_3") + 1)
RESPONSE = "response"  # name of its weights
FULL_RESOLUTION = ("stem", "enter.0", "leave.0", "head", "embed")  # names of its weights, and of what all levels share
STRIDE = 4  # volumes are padded to a multiple of this
STRICT_FROM = 0.33  # dose fraction from which on the gate's offset applies in full; below, in proportion


@dataclass(frozen=True)
class Architecture:
    """Width per level (full, half, quarter resolution) and residual blocks per level."""

    widths: tuple[int, int, int] = (16, 48, 96)  # multiples of 16: others are slower than the next larger one
    blocks: tuple[int, int, int] = (1, 2, 3)
    embedding: int = 64


VARIANTS = {"small": Architecture(), "base": Architecture((32, 64, 128), (2, 2, 3), 96)}


class Response(nn.Module):
    """What the standard dose shows of an enhancement that is known in proportion to the dose (ADR 21).

    How much a signal saturates follows from sequence, timing, agent, field strength and dose, and from how bright the
    voxel was before: a polynomial per acquisition, whose coefficients a small network gives. It sees one voxel at a
    time, and is learned from voxels without images (`models.training.response`), not with the rest.
    """

    POWERS = (4, 3)  # coefficients over the saturating proportional signal, and over the pre-contrast image
    STRONGEST, BRIGHTEST = 3.0, 1.3  # of either that is told apart, white matter = 1: beyond is too rare to learn

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        told = [index for index, name in enumerate(NAMES) if name not in MEASURED]
        self.told: Tensor
        self.register_buffer("told", torch.tensor(told), persistent=False)
        self.layers = nn.Sequential(
            *(nn.Linear(len(told), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, self.POWERS[0] * self.POWERS[1])),
        )
        for start in self.layers[-1].parameters():  # unlearned, it is proportion
            nn.init.zeros_(start)

    def forward(self, proportional: Tensor, pre: Tensor, condition: Tensor) -> Tensor:
        """Signals over the dose fraction (n, m, k, j, i), pre-contrast image (n, 1, ...), condition; (n, m, k, j, i).

        At most HEADROOM times the proportional signal, and of its sign.
        """
        with torch.autocast(proportional.device.type, enabled=False):  # terms cancel
            terms = self.layers(condition[:, self.told]).reshape(-1, *self.POWERS, 1, 1, 1, 1)
            bright = torch.clamp(pre, 0, self.BRIGHTEST)
            strong = torch.clamp(proportional, 0, self.STRONGEST)
            strong = strong / (1 + strong)
            logarithm = torch.zeros_like(strong)
            for power in reversed(range(self.POWERS[0])):
                at = terms[:, power]
                logarithm = logarithm * strong + (at[:, 0] + bright * (at[:, 1] + bright * at[:, 2]))
            return proportional * torch.exp(torch.clamp(2 * torch.tanh(logarithm / 2), max=math.log(HEADROOM)))


class ChannelNorm(nn.Module):
    """Every voxel's channels over their root mean square, with a learned gain per channel.

    What follows no longer sees how large a sum of residual blocks has grown: that had shut activations (ADR 15).
    No voxel sees another, so tiles agree.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, width, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, k, j, i) to the same."""
        x = x / 16  # a square of 256 and more is no number in half precision
        return x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-2 / 256) * self.gain


class Block(nn.Module):
    """Two 3x3x3 convolutions around a feature-wise scale and shift by the embedding, plus the input."""

    def __init__(self, width: int, embedding: int, *, normed: bool) -> None:
        super().__init__()
        self.norm = ChannelNorm(width) if normed else nn.Identity()
        self.first = nn.Conv3d(width, width, 3, padding=1)
        self.second = nn.Conv3d(width, width, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * width)
        for start in (self.second.weight, *self.modulate.parameters()):  # every block starts as the identity
            nn.init.zeros_(start)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, c, k, j, i) and (n, e) to (n, c, k, j, i)."""
        scale, shift = self.modulate(embedding)[:, :, None, None, None].chunk(2, dim=1)
        hidden = functional.silu(self.first(self.norm(x)) * (1 + scale) + shift)
        return x + self.second(hidden)


class Level(nn.Module):
    """The residual blocks of a resolution on one way; the full resolution, the most costly, needs no norm."""

    def __init__(self, architecture: Architecture, level: int) -> None:
        super().__init__()
        width, normed = architecture.widths[level], level > 0
        self.blocks = nn.ModuleList(
            Block(width, architecture.embedding, normed=normed) for _ in range(architecture.blocks[level])
        )
        self.norm = ChannelNorm(width) if normed else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, c, k, j, i) and (n, e) to (n, c, k, j, i)."""
        for block in self.blocks:
            x = block(x, embedding)
        return functional.silu(self.norm(x))


class Parts(NamedTuple):
    """What a prediction is made of, each (n, 1, k, j, i), and what training asks of the coarse levels."""

    signal: Tensor  # if there is any, not negative
    gate: Tensor  # evidence that there is, learned as a logit; with its neighbours', before the operating point
    offset_share: Tensor  # (n, 1, 1, 1, 1): how much of the gate's offset applies at the dose
    bound: Tensor
    coarse: tuple[Tensor, Tensor]  # (n, 2, ...), signal and logit, at half and quarter resolution on the way back


class Network(nn.Module):
    """Contrast signal from the subtraction image, the pre-contrast image, local noise and the acquisition."""

    def __init__(self, architecture: Architecture, *, conditioned: bool = True) -> None:
        super().__init__()
        self.conditioned = conditioned  # if not, the graph forgets the acquisition, but for the bound: a baseline
        self.gate_offset = 0.0  # the operating point: what is taken from the gate's logit
        a, b, c = architecture.widths
        e = architecture.embedding
        self.response = Response()
        self.embed = nn.Sequential(nn.Linear(len(NAMES), e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.stem = nn.Conv3d(11, a, 3, padding=1)
        self.down_1, self.down_2 = nn.Conv3d(a, b, 2, stride=2), nn.Conv3d(b, c, 2, stride=2)
        self.up_2, self.up_1 = nn.ConvTranspose3d(c, b, 2, stride=2), nn.ConvTranspose3d(b, a, 2, stride=2)
        self.enter = nn.ModuleList(Level(architecture, level) for level in (0, 1, 2))
        self.leave = nn.ModuleList(Level(architecture, level) for level in (0, 1))
        self.told = nn.ModuleList(nn.Conv3d(width, 2, 1) for width in (b, c))  # asked in training alone (ADR 16)
        self.head = nn.Conv3d(a, 8, 3, padding=1)
        for start in self.head.parameters():  # and the network as a smoothed, gated amplification
            nn.init.zeros_(start)
        self.mix: Tensor
        self.register_buffer("mix", torch.tensor([1.0, 2.0, 0.0, -2.0]).reshape(1, 4, 1, 1, 1), persistent=False)
        kernel = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer(
            "binomial", (kernel[:, None, None] * kernel[:, None] * kernel)[None, None], persistent=False
        )
        self.kept: Tensor
        kept = torch.tensor([float(conditioned or name in MEASURED) for name in NAMES])
        self.register_buffer("kept", kept, persistent=False)

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights.

        Raises:
            ValueError: they are of another architecture, such as one before coarse levels were asked (ADR 16).
        """
        own = self.state_dict()
        unlike = [
            name
            for name in sorted({*own, *weights})
            if name not in own or name not in weights or own[name].shape != weights[name].shape
        ]
        if unlike:
            raise ValueError(
                f"the weights are of another architecture: {len(unlike)} do not fit, the first is {unlike[0]}"
            )
        self.load_state_dict(weights)

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """Predict.

        Args:
            images: (n, 3, k, j, i): subtraction, pre-contrast, local noise; white matter = 1; sides multiples of 4.
            condition: (n, len(NAMES)) from models.condition.vector.

        Returns:
            (n, 1, k, j, i) contrast signal of the standard dose, within the bound.
        """
        return self.clamp(*self.unbounded(images, condition))

    @staticmethod
    def clamp(raw: Tensor, bound: Tensor) -> Tensor:
        """The bound, by construction: min(raw, bound) of two non-negative numbers."""
        return torch.minimum(raw, bound)

    def unbounded(self, images: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction before the bound, and the bound; both (n, 1, k, j, i) and non-negative."""
        signal, gate, offset_share, bound, _ = self.parts(images, condition)
        return self.opened(signal, gate, offset_share), bound

    def opened(self, signal: Tensor, gate: Tensor, offset_share: Tensor) -> Tensor:
        """The signal behind the gate at the operating point: half the harmonic mean of it and CAP * exp(gate - offset).

        So a gate that is nearly shut lets nothing through that is seen, however strong the signal would be. What is
        faint at a third of the dose is fainter below it: there the same offset shut many lesions away (ADR 18).
        """
        shut = torch.clamp(self.gate_offset * offset_share - gate, -30, 30)
        return signal / (1 + signal / CAP * torch.exp(shut))

    def parts(self, images: Tensor, condition: Tensor) -> Parts:
        """What a prediction of `unbounded` is made of."""
        bounding = dose_fraction(condition)[:, None, None, None, None]
        if not self.conditioned:
            condition = condition * self.kept
        dose = dose_fraction(condition)[:, None, None, None, None]
        z, pre, noise = images[:, 0:1], images[:, 1:2], images[:, 2:3]
        once = self._blur(z, 1)
        twice = self._blur(once, 1)
        wide = self._blur(twice, 2)
        measured = torch.cat([z, once, twice, wide], 1)
        bound = HEADROOM / bounding * functional.relu(measured.amax(1, keepdim=True))
        amplified = self.response(measured / dose, pre, condition)
        left = functional.pad(torch.exp(condition[:, NOISE_LEFT]), (1, 0), value=1.0)[:, :, None, None, None]
        clarity = measured / (torch.clamp(noise, min=1e-3) * left)
        seen = torch.cat([torch.tanh(amplified / 2) * 2, torch.tanh(clarity / 6) * 3, pre, 5 * noise, noise / dose], 1)
        features, coarse = self._body(seen, self.embed(condition))
        out = self.head(features)
        mixed = (torch.softmax(out[:, 0:4] + self.mix, 1) * amplified).sum(1, keepdim=True)
        share, gain, own, gate = out[:, 4:5], out[:, 5:6], out[:, 6:7], out[:, 7:8]
        signal = torch.sigmoid(share + 3) * mixed * torch.exp(0.5 * torch.tanh(gain)) + own
        prior = 2 * (clarity[:, 1:].amax(1, keepdim=True) - CLEAR)
        gate = self._blur(self._blur(gate + torch.clamp(prior, -6, 6), 1), 1)  # in one voxel alone it is mostly noise
        beside = functional.max_pool3d(self._blur(gate, 1), 3, stride=1, padding=1)
        gate = torch.minimum(gate + NEIGHBOURLY, beside)  # noise is alone, what enhances has neighbours that do
        offset_share = torch.clamp(dose / STRICT_FROM, max=1)
        return Parts(functional.relu(signal), gate, offset_share, bound, coarse)

    def _body(self, seen: Tensor, embedding: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        full = self.enter[0](self.stem(seen), embedding)
        half = self.enter[1](self.down_1(full), embedding)
        quarter = self.enter[2](self.down_2(half), embedding)
        half = self.leave[1](half + self.up_2(quarter), embedding)
        features = self.leave[0](full + self.up_1(half), embedding)
        return features, (self.told[0](half), self.told[1](quarter))

    def _blur(self, z: Tensor, dilation: int) -> Tensor:
        """3x3x3 binomial with its taps `dilation` voxels apart, edges replicated."""
        padded = functional.pad(z, (dilation,) * 6, mode="replicate")
        with torch.autocast(z.device.type, enabled=False):  # the bound is exact whatever the precision of the body
            return functional.conv3d(padded, self.binomial, dilation=dilation)  # type: ignore[arg-type]


def dose_fraction(condition: Tensor) -> Tensor:
    """(n,): the dose fraction in the condition, or the assumed one of the bound where it is unknown."""
    known = condition[:, DOSE_KNOWN_INDEX]
    return known * torch.exp(condition[:, DOSE_INDEX]) + (1 - known) * UNKNOWN_DOSE_FRACTION
