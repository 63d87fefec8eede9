"""The conditional residual 3-D U-Net with its bounded output.

Hides the architecture. With the subtraction z and its smoothings z1, z2, z3 (binomial, twice, and once more twice as
wide), the pre-contrast image p, local noise sigma, the dose fraction d and the acquisition c:

    a_i = R(z_i / d; p, c)            amplified by the learned dose response (`DoseResponse`)
    q_i = z_i / (sigma l_i)           signal-to-noise ratio; l_i: share of the noise that the smoothing leaves
    w, share, gain, own, logit = U(a, q, p, sigma, sigma / d; c)
    s = relu(sigmoid(share) exp(gain) sum_i w_i a_i + own)              the signal, if there is any
    g = min(h + NEIGHBOURLY, max_beside blur(h)), h = blur(blur(logit + prior(q)))     the gate
    y = min(s / (1 + s / (CAP exp(g - offset))), HEADROOM / d * max(z, z1, z2, z3, 0))

U is the U-Net (Ronneberger et al., arXiv 1505.04597) with FiLM by c; what enters and leaves it is limited to a range,
by the constants below. The second term of the minimum is the bound: the graph itself computes it from the measured
subtraction, so that it holds whatever the weights are. No layer's statistics depend on the size of the input, so tiles
and the whole volume agree. Must never use information outside its two inputs.
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

# The gate. Measured on validation studies (ADR 15) where it says so, else chosen.
CAP = 0.3  # of white matter: what a gate of 0 lets through at most (ADR 15)
NEIGHBOURLY = 2.0  # how much further it opens than its own evidence says, beside more; 3, 4 no better (EXPERIMENTS)
STRICT_FROM = 0.33  # dose fraction from which on its offset applies in full; below, in proportion (ADR 15)
CLEAR = 3.0  # signal-to-noise ratio, after smoothing, at which an untrained network's logit is 0 (ADR 12)
PRIOR_SLOPE, PRIOR_LIMIT = (
    2.0,
    6.0,
)  # of that logit, per unit of the ratio; and its limit, so that learning can overrule it
EXPONENT_LIMIT = 30.0  # exp(30) and its square are still numbers; beyond, the gate is open or shut
# What the U-Net sees, so that all of it is of the order of 1. Chosen.
BRIGHTEST_SEEN = 2.0  # amplified signal is told apart up to here, white matter = 1
RATIO_SEEN, RATIO_WEIGHT = 6.0, 0.5  # ratio likewise; then a factor
NOISE_WEIGHT = 5.0  # of local noise, .011 to .115 of white matter in training
LEAST_NOISE = 1e-3  # of white matter: padding has none, and the ratio stays a number
# What it may make of the signal. Chosen; an untrained network is a smoothed amplification.
MIX_START = (1.0, 2.0, 0.0, -2.0)  # logits of z, z1, z2, z3: shares of .24, .65, .09 and .01
SHARE_START = 3.0  # logit of what is shown of their mixture: .95
GAIN_RANGE = 0.5  # of its logarithm: a factor of .61 to 1.65
NOISE_LEFT = slice(NAMES.index("log_noise_left_1"), NAMES.index("log_noise_left_3") + 1)
RESPONSE = "response"  # name of its weights
FULL_RESOLUTION = ("stem", "encoder.0", "decoder.0", "head", "embed")  # of weights, and of what all levels share
STRIDE = 4  # volumes are padded to a multiple of this: resolution is halved twice


@dataclass(frozen=True)
class Architecture:
    """Width per level (full, half, quarter resolution) and residual blocks per level."""

    widths: tuple[int, int, int] = (16, 48, 96)  # multiples of 16: others are slower than the next larger one
    blocks: tuple[int, int, int] = (1, 2, 3)
    embedding: int = 64


VARIANTS = {"small": Architecture(), "base": Architecture((32, 64, 128), (2, 2, 3), 96)}


class DoseResponse(nn.Module):
    """What the standard dose shows of an enhancement that is known in proportion to the dose (ADR 15).

    R(x; p, c) = x exp(2 tanh(f / 2)), at most HEADROOM x, with the polynomial f = sum_mn k_mn(c) t^m p^n of the
    saturating signal t = x / (1 + x) and the pre-contrast image p. How much a signal saturates follows from sequence,
    timing, agent, field strength and dose, and from how bright the voxel was before: a multilayer perceptron gives the
    coefficients k of an acquisition. It sees one voxel at a time, and is learned from voxels without images
    (`models.training.response`), not with the rest.
    """

    POWERS = (4, 3)  # coefficients over t and p: fitted to a study they leave .016 of an error of .066 (EXPERIMENTS)
    STRONGEST, BRIGHTEST = 3.0, 1.3  # of x and p that is told apart, white matter = 1: beyond is too rare to learn
    LOG_LIMIT = 2.0  # of the logarithm of the factor

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        header = [index for index, name in enumerate(NAMES) if name not in MEASURED]
        self.header: Tensor  # columns of the condition that a header tells
        self.register_buffer("header", torch.tensor(header), persistent=False)
        self.layers = nn.Sequential(
            *(nn.Linear(len(header), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, self.POWERS[0] * self.POWERS[1])),
        )
        for start in self.layers[-1].parameters():  # unlearned, it is proportion
            nn.init.zeros_(start)

    def forward(self, proportional: Tensor, pre: Tensor, condition: Tensor) -> Tensor:
        """Signals over the dose fraction (n, m, k, j, i), pre-contrast image (n, 1, ...), condition; (n, m, k, j, i).

        At most HEADROOM times the proportional signal, and of its sign.
        """
        with torch.autocast(proportional.device.type, enabled=False):  # terms cancel
            terms = self.layers(condition[:, self.header]).reshape(-1, *self.POWERS, 1, 1, 1, 1)
            bright = torch.clamp(pre, 0, self.BRIGHTEST)
            strong = torch.clamp(proportional, 0, self.STRONGEST)
            strong = strong / (1 + strong)
            logarithm = torch.zeros_like(strong)
            for power in reversed(range(self.POWERS[0])):  # Horner's rule
                at = terms[:, power]
                logarithm = logarithm * strong + (at[:, 0] + bright * (at[:, 1] + bright * at[:, 2]))
            limited = soft_limit(logarithm, self.LOG_LIMIT)
            return proportional * torch.exp(torch.clamp(limited, max=math.log(HEADROOM)))


class RMSNorm(nn.Module):
    """Root mean square normalisation over the channels of a voxel: y_c = g_c x_c / sqrt(mean_c(x_c^2) + EPSILON).

    Zhang and Sennrich, arXiv 1910.07467; `torch.nn.RMSNorm` takes its mean over the last axes, here it is the second.
    What follows no longer sees how large a sum of residual blocks has grown: that had shut activations (ADR 15). No
    voxel sees another, so tiles agree.
    """

    EPSILON = 1e-2  # chosen: channels of .1 and less are left small
    SCALE = 16  # a square of 256 and more is no number in half precision: with x / 16, sums of some thousands are

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, width, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, k, j, i) to the same."""
        x = x / self.SCALE
        return x * torch.rsqrt((x * x).mean(1, keepdim=True) + self.EPSILON / self.SCALE**2) * self.gain


class ResidualBlock(nn.Module):
    """x + W2 silu((1 + scale(e)) W1 norm(x) + shift(e)), with W 3x3x3 convolutions and the embedding e.

    Scale and shift per feature are FiLM, feature-wise linear modulation (Perez et al., arXiv 1709.07871).
    """

    def __init__(self, width: int, embedding: int, *, normed: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(width) if normed else nn.Identity()
        self.first = nn.Conv3d(width, width, 3, padding=1)
        self.second = nn.Conv3d(width, width, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * width)
        for start in (self.second.weight, *self.film.parameters()):  # every block starts as the identity
            nn.init.zeros_(start)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, c, k, j, i) and (n, e) to (n, c, k, j, i)."""
        scale, shift = self.film(embedding)[:, :, None, None, None].chunk(2, dim=1)
        hidden = functional.silu(self.first(self.norm(x)) * (1 + scale) + shift)
        return x + self.second(hidden)


class Level(nn.Module):
    """silu(norm(residual blocks of x)) at one resolution; the full one, the most costly, needs no norm."""

    def __init__(self, architecture: Architecture, level: int) -> None:
        super().__init__()
        width, normed = architecture.widths[level], level > 0
        self.blocks = nn.ModuleList(
            ResidualBlock(width, architecture.embedding, normed=normed) for _ in range(architecture.blocks[level])
        )
        self.norm = RMSNorm(width) if normed else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, c, k, j, i) and (n, e) to (n, c, k, j, i)."""
        for block in self.blocks:
            x = block(x, embedding)
        return functional.silu(self.norm(x))


class Parts(NamedTuple):
    """What a prediction is made of, each (n, 1, k, j, i), and what the auxiliary heads say of it."""

    signal: Tensor  # if there is any, not negative
    gate: Tensor  # evidence that there is, learned as a logit; with its neighbours', before the operating point
    offset_share: Tensor  # (n, 1, 1, 1, 1): how much of the gate's offset applies at the dose
    bound: Tensor
    auxiliary: tuple[Tensor, Tensor]  # (n, 2, ...), signal and logit, of the decoder's half and quarter resolution


class Network(nn.Module):
    """Contrast signal from the subtraction image, the pre-contrast image, local noise and the acquisition.

    The auxiliary heads are for training alone: deep supervision (Lee et al., arXiv 1409.5185; ADR 15).
    """

    def __init__(self, architecture: Architecture, *, conditioned: bool = True) -> None:
        super().__init__()
        self.conditioned = conditioned  # if not, the graph forgets the acquisition, but for the bound: a baseline
        self.gate_offset = 0.0  # the operating point: what is taken from the gate's logit
        a, b, c = architecture.widths
        e = architecture.embedding
        self.response = DoseResponse()
        self.embed = nn.Sequential(nn.Linear(len(NAMES), e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.stem = nn.Conv3d(11, a, 3, padding=1)  # four amplified, four ratios, pre-contrast, noise, noise over dose
        self.down_1, self.down_2 = nn.Conv3d(a, b, 2, stride=2), nn.Conv3d(b, c, 2, stride=2)
        self.up_2, self.up_1 = nn.ConvTranspose3d(c, b, 2, stride=2), nn.ConvTranspose3d(b, a, 2, stride=2)
        self.encoder = nn.ModuleList(Level(architecture, level) for level in (0, 1, 2))
        self.decoder = nn.ModuleList(Level(architecture, level) for level in (0, 1))
        self.auxiliary_heads = nn.ModuleList(nn.Conv3d(width, 2, 1) for width in (b, c))
        self.head = nn.Conv3d(a, 8, 3, padding=1)  # four weights, share, gain, own signal, logit
        for start in self.head.parameters():  # and the network as a smoothed, gated amplification
            nn.init.zeros_(start)
        self.mix: Tensor
        self.register_buffer("mix", torch.tensor(MIX_START).reshape(1, 4, 1, 1, 1), persistent=False)
        kernel = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer(
            "binomial", (kernel[:, None, None] * kernel[:, None] * kernel)[None, None], persistent=False
        )
        self.kept: Tensor
        kept = torch.tensor([float(conditioned or name in MEASURED) for name in NAMES])
        self.register_buffer("kept", kept, persistent=False)

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights by their names of today (see `models.training.checkpoint`).

        Raises:
            ValueError: they are of another architecture, such as one before there were auxiliary heads (ADR 15).
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
        """The signal s behind the gate g at the operating point o: s / (1 + s / (CAP exp(g - o))).

        Half the harmonic mean of the signal and of what the evidence allows. So a gate that is nearly shut lets nothing
        through that is seen, however strong the signal would be. What is faint at a third of the dose is fainter below
        it: there the same offset shut many lesions away, so that only a share of it applies (ADR 15).
        """
        shut = torch.clamp(self.gate_offset * offset_share - gate, -EXPONENT_LIMIT, EXPONENT_LIMIT)
        return signal / (1 + signal / CAP * torch.exp(shut))

    def parts(self, images: Tensor, condition: Tensor) -> Parts:
        """What a prediction of `unbounded` is made of; equations at the head of this module."""
        bounding = dose_fraction(condition)[:, None, None, None, None]
        if not self.conditioned:
            condition = condition * self.kept
        dose = dose_fraction(condition)[:, None, None, None, None]
        measured, pre, noise = self._smoothed(images[:, 0:1]), images[:, 1:2], images[:, 2:3]
        bound = HEADROOM / bounding * functional.relu(measured.amax(1, keepdim=True))
        amplified = self.response(measured / dose, pre, condition)
        left = functional.pad(torch.exp(condition[:, NOISE_LEFT]), (1, 0), value=1.0)[:, :, None, None, None]
        ratio = measured / (torch.clamp(noise, min=LEAST_NOISE) * left)
        seen = [soft_limit(amplified, BRIGHTEST_SEEN), RATIO_WEIGHT * soft_limit(ratio, RATIO_SEEN)]
        seen += [pre, NOISE_WEIGHT * noise, noise / dose]
        features, auxiliary = self._unet(torch.cat(seen, 1), self.embed(condition))
        out = self.head(features)
        mixed = (torch.softmax(out[:, 0:4] + self.mix, 1) * amplified).sum(1, keepdim=True)
        share, gain, own, logit = out[:, 4:5], out[:, 5:6], out[:, 6:7], out[:, 7:8]
        signal = torch.sigmoid(share + SHARE_START) * mixed * torch.exp(GAIN_RANGE * torch.tanh(gain)) + own
        offset_share = torch.clamp(dose / STRICT_FROM, max=1)
        return Parts(functional.relu(signal), self._gate(logit, ratio), offset_share, bound, auxiliary)

    def _smoothed(self, z: Tensor) -> Tensor:
        """The subtraction and its three smoothings z1, z2, z3: (n, 1, k, j, i) to (n, 4, k, j, i)."""
        once = self._blur(z, 1)
        twice = self._blur(once, 1)
        return torch.cat([z, once, twice, self._blur(twice, 2)], 1)

    def _gate(self, logit: Tensor, ratio: Tensor) -> Tensor:
        """The gate: g = min(h + NEIGHBOURLY, max_beside blur(h)), with h = blur(blur(logit + prior)).

        prior = PRIOR_SLOPE (max_i q_i - CLEAR) over the smoothed ratios, limited; `max_beside` is over 3x3x3 voxels.
        So a voxel is opened by NEIGHBOURLY at most, and never above the smoothed evidence around it.
        """
        prior = PRIOR_SLOPE * (ratio[:, 1:].amax(1, keepdim=True) - CLEAR)
        gate = logit + torch.clamp(prior, -PRIOR_LIMIT, PRIOR_LIMIT)
        gate = self._blur(self._blur(gate, 1), 1)  # in one voxel alone it is mostly noise
        beside = functional.max_pool3d(self._blur(gate, 1), 3, stride=1, padding=1)
        return torch.minimum(gate + NEIGHBOURLY, beside)  # noise is alone, what enhances has neighbours that do

    def _unet(self, seen: Tensor, embedding: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Features at full resolution, and what the auxiliary heads make of the coarser ones; skips are added."""
        full = self.encoder[0](self.stem(seen), embedding)
        half = self.encoder[1](self.down_1(full), embedding)
        quarter = self.encoder[2](self.down_2(half), embedding)
        half = self.decoder[1](half + self.up_2(quarter), embedding)
        features = self.decoder[0](full + self.up_1(half), embedding)
        return features, (self.auxiliary_heads[0](half), self.auxiliary_heads[1](quarter))

    def _blur(self, z: Tensor, dilation: int) -> Tensor:
        """3x3x3 binomial with its taps `dilation` voxels apart, edges replicated."""
        padded = functional.pad(z, (dilation,) * 6, mode="replicate")
        with torch.autocast(z.device.type, enabled=False):  # the bound is exact whatever the precision of the body
            return functional.conv3d(padded, self.binomial, dilation=dilation)  # type: ignore[arg-type]


def soft_limit(x: Tensor, limit: float) -> Tensor:
    """L tanh(x / L): about x where that is small, within the limit L everywhere."""
    return limit * torch.tanh(x / limit)


def dose_fraction(condition: Tensor) -> Tensor:
    """(n,): the dose fraction in the condition, or the assumed one of the bound where it is unknown."""
    known = condition[:, DOSE_KNOWN_INDEX]
    return known * torch.exp(condition[:, DOSE_INDEX]) + (1 - known) * UNKNOWN_DOSE_FRACTION
