"""The words and tables of CARD.md.

Hides what a card says of an evaluation. Must never say more of a network than its tables show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from models.card import STARTED, Card

Row = dict[str, str]


@dataclass(frozen=True)
class Tested:
    """What the network was evaluated on."""

    studies: int
    refused: int  # by the quality gate
    side: int  # voxels of a study's side
    quiet: float  # share of the brain in which false voxels are counted
    beside: tuple[Card, ...]  # networks it is compared with


def render(card: Card, tables: Mapping[str, Sequence[Row]], tested: Tested) -> str:
    """CARD.md; tables by name, of which those without words of their own are left out."""
    head = (
        f"# {card.id}\n\n"
        f"**{card.intended_use}.**\n\n"
        f"Predicts the contrast signal of the standard dose from a pre-contrast and a low-dose T1 volume.\n\n"
        f"| | |\n| --- | --- |\n| variant | {card.variant} |\n"
        f"| training | preset {card.preset}, {card.steps} steps, seed {card.seed} |\n"
        f"| operating point | {_operating_point(card)} |\n"
        f"| ONNX opset | {card.opset} |\n| contract | {card.contract} |\n"
        f"| SHA-256 of model.onnx | `{card.sha256}` |\n\n"
    )
    limits = f"## What it cannot do\n\n{_bullets(card.limits)}"
    data = f"## What it was trained on, each stage started from the next\n\n{_bullets(card.stages)}"
    beside = f"\nNetworks it is compared with:\n\n{_bullets(map(_compared, tested.beside))}" if tested.beside else ""
    parts = [
        f"\n## {title}\n\n{_words(text)}\n\n{_table(tables[name])}"
        for name, (title, text) in _TEXTS.items()
        if name in tables
    ]
    preface = _words(_PREFACE).format(
        studies=tested.studies, refused=tested.refused, side=tested.side, quiet=tested.quiet
    )
    return f"{head}{limits}\n{data}\n## Evaluation\n\n{preface}\n{beside}{''.join(parts)}"


def _compared(card: Card) -> str:
    """What sets a network apart: what it started from and went on with, and its operating point."""
    training = f"preset {card.preset}, {card.steps} steps, seed {card.seed}"
    data = STARTED.join(card.stages[:2])
    if more := card.stages[2:]:
        data += f" (and {len(more)} stages before)"
    return f"`{card.id}`: variant {card.variant}; {training}; {_operating_point(card)}; {data}"


def _operating_point(card: Card) -> str:
    below = f", below {card.gate_strict_from:.0%} of the standard dose in proportion" if card.gate_strict_from else ""
    return f"gate offset {card.gate_offset:g}{below}"


def _bullets(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items)


def _words(text: str) -> str:
    """On one line, as a paragraph of Markdown."""
    return " ".join(text.split())


def _table(rows: Sequence[Row]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_PREFACE = """
Simulated studies: {studies} from seeds that no training run used, the same anatomy at every dose. Each is a block of
{side} voxels a side, randomly placed in a head: counts per study are not counts per head. {refused} more were drawn
that the quality gate refuses (mostly for residual motion), of which no image is made. Brain and alignment, up to
residual motion, are known: finding them is tested elsewhere, and every head is a variation of one template. Mean, 95 %
bootstrap interval, whole studies resampled. Signals in units of white matter. Where the truth enhances by more than
0.1: `ce_error` mean absolute error, `slope` and `intercept` of the predicted on the true signal, `psnr_db` (peak 1),
`ssim` (range 1). In brain farther than 2.5 mm from true enhancement: `false_per_ml` voxels above 0.1 per mL,
`false_components` of 2 mm and more per litre, `quiet_signal` mean; that is {quiet:.0%} of the brain. `halo_per_ml`:
voxels above 0.1 per mL of the brain nearer to enhancement whose own truth is below 0.02: blur and false rims. `dice`:
of voxels above 0.1. `error_over_linear`: ratio of mean CE errors to the linear engine's. The linear engine sees the
same motion-corrected subtraction as the network. Figures are in `evaluation/`.
"""
_TEXTS = {  # of a table: its title, and what it is
    "real": (
        "Real pair",
        """
        A pair of which the enhancement is known, through the pipeline of a hospital's study. That of the bundled
        networks is a glioma whose low dose (33 %) was simulated from its real scans before and after contrast. It
        showed what simulated heads lacked (ADR 14), so it is no independent evidence. SD+: the signal on the grid of
        the low-dose series, to which the truth is carried in the same way: an error of registration does not show
        there.
        """,
    ),
    "methods": (
        "Methods",
        """
        `raw amplification` is the subtraction over the dose fraction, `low-dose copy` the subtraction; neither is cut
        at 0. `non-local means` is not tuned. At 100 %: the standard dose itself, another scan of the same study; `true
        standard dose` is smoothed and gated as in the linear engine, `standard dose as acquired` is neither.
        """,
    ),
    "large": (
        "Lesions of 5 mm and more, against the standard dose",
        """
        Share found, and how much larger it is than with the standard dose (`standard`: smoothed and gated as in the
        linear engine; `acquired`: neither), in the same studies, paired; above 0.1, where as acquired noise alone finds
        some, and where each method is held to 0.5 false components per study.
        """,
    ),
    "series": (
        "SD and SD+",
        """
        What the two derived series show, and what was acquired; lesions of 5 mm and more. SD is the pre-contrast image
        plus the predicted signal. SD+ is the low-dose image (here with its motion corrected, in a result as it was
        acquired) plus the same signal: by what the low dose shows itself it shows a lesion more strongly than SD, and
        more than the standard dose would where the signal misses less than that. Each carries the noise of the image it
        is added to. `recovery` is over the true signal of the standard dose. Of SD+ there is no truth: none of these
        scans looks like it.
        """,
    ),
    "kinds": (
        "Kinds of studies",
        """
        At 33 %. The true standard dose is the same study scanned with it, treated as in the linear engine: its false
        voxels come from motion and noise, not from a lower dose. Few studies each: read the intervals. Noise is that of
        one image, before preprocessing, white matter = 1.
        """,
    ),
    "lesions": (
        "Lesions",
        """
        `found_at_0.5_false`: 0.9 quantile of the signal in the lesion above the threshold that leaves 0.5 false
        components per study (chosen on these studies, which intervals leave out). Lesions of fewer than 3 voxels, or
        with a mean truth below 0.02, are not counted. `ideal_observer`: share that a matched filter, told shape and
        place, finds (d' of 5.5) were noise white and enhancement in proportion to dose: an estimate, no bound. The true
        standard dose is the same study scanned with it, smoothed and gated as in the linear engine; as acquired it is
        neither, and noise alone exceeds 0.1 in many of its voxels. `error_over_linear`: ratio of the mean absolute
        errors inside the lesions. `cnr`, `lbr` and `cep_percent` are of the pre-contrast image plus the signal: CNR and
        LBR against quiet brain about as bright as white matter, CNR over the noise of the image; CEP of means over
        lesions.
        """,
    ),
    "enhancement": (
        "Lesions by enhancement",
        """
        As above, by mean true enhancement; white matter = 1.
        """,
    ),
    "rescans": (
        "Rescans without contrast",
        """
        Two scans without contrast, the second said to be of the dose in the first column: all signal is false.
        """,
    ),
    "ablations": (
        "What the inputs are worth",
        """
        CE error with an input shuffled between studies or removed, over the error with it. Timing is shuffled within a
        class of sequences; a shuffled class keeps the timing of the other, most of which is then unknown. Unknown is
        told as at inference: the dose fraction needs both dose and agent, timing the class. The operating point follows
        the dose that is told: what shuffling it costs holds that, too. Intervals are not corrected for the number of
        comparisons: of so many one is expected to seem to cost.
        """,
    ),
    "embedding": (
        "What the embedding tells apart",
        """
        Share of the variance of the embedding, over a grid of acquisitions, that each variable explains alone. What the
        header tells acts through the dose response, too, of which this shows nothing.
        """,
    ),
}
