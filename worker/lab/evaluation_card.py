"""The words and tables of CARD.md: one page in front for whoever has to decide, all tables behind it.

Hides what a card says of an evaluation, and which figures were wanted. Must never say more of a network than its tables
show, nor leave out a wanted figure that was missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from models.card import STARTED, Card

Row = dict[str, str]
Tables = Mapping[str, Sequence[Row]]

STANDARD = "true standard dose"  # smoothed and gated as in the linear engine: its row in the table of methods


@dataclass(frozen=True)
class Tested:
    """What the network was evaluated on."""

    studies: int
    refused: int  # by the quality gate
    side: int  # voxels of a study's side
    quiet: float  # share of the brain in which false voxels are counted
    beside: tuple[Card, ...]  # networks it is compared with


@dataclass(frozen=True)
class _Figure:
    """A figure of the front page: where it stands in the tables, and what was wanted of the network.

    Args:
        words: what it says.
        table: name of the table.
        row: column and value that pick its rows, one for each method.
        column: of the figure.
        most: the highest value that was wanted; None: no upper limit.
        least: the lowest value that was wanted; None: no lower limit.
    """

    words: str
    table: str
    row: tuple[str, str]
    column: str
    most: float | None = None
    least: float | None = None


_FIGURES = (
    _Figure("error, 33 % of the dose", "methods", ("dose", "33%"), "ce_error"),
    _Figure("error, 10 % of the dose", "methods", ("dose", "10%"), "ce_error"),
    _Figure("error over the linear engine's, 33 %", "methods", ("dose", "33%"), "error_over_linear"),
    _Figure("error over the linear engine's, 10 %", "methods", ("dose", "10%"), "error_over_linear", most=0.6),
    _Figure("error over the linear engine's, real pair", "real", ("data", "real pair"), "error_over_linear", most=0.8),
    _Figure("false voxels per mL of quiet brain, 33 %", "methods", ("dose", "33%"), "false_per_ml", most=0.1),
    _Figure("false voxels per mL of quiet brain, 10 %", "methods", ("dose", "10%"), "false_per_ml"),
    _Figure("false voxels per mL near enhancement, 33 %", "methods", ("dose", "33%"), "halo_per_ml"),
    _Figure("false voxels per mL near enhancement, 10 %", "methods", ("dose", "10%"), "halo_per_ml"),
    _Figure("false voxels per mL, no contrast given, said to be 33 %", "rescans", ("said", "33%"), "false_per_ml"),
    _Figure("false voxels per mL, no contrast given, said to be 10 %", "rescans", ("said", "10%"), "false_per_ml"),
    _Figure("lesions of 5 mm and more found, 33 %", "large", ("dose", "33%"), "found_above_0.1"),
    _Figure("these less those of the standard dose", "large", ("dose", "33%"), "above_0.1_less_standard", least=-0.03),
    _Figure("the same at half a false component", "large", ("dose", "33%"), "at_0.5_false_less_standard", least=-0.03),
    _Figure("lesions of 5 mm and more found, 10 %", "large", ("dose", "10%"), "found_above_0.1"),
)


def render(card: Card, tables: Tables, tested: Tested) -> str:
    """CARD.md; tables by name, of which those without words of their own are left out."""
    preface = _words(_PREFACE).format(
        studies=tested.studies, refused=tested.refused, side=tested.side, quiet=tested.quiet
    )
    beside = f"\nNetworks it is compared with:\n\n{_bullets(map(_compared, tested.beside))}" if tested.beside else ""
    parts = [
        f"\n## {title}\n\n{_words(text)}\n\n{_table(tables[name])}"
        for name, (title, text) in _TEXTS.items()
        if name in tables
    ]
    stages = f"\n## Every stage of its training, each started from the next\n\n{_bullets(card.stages)}"
    return f"{front(card, tables)}\n## Evaluation\n\n{preface}\n{beside}{''.join(parts)}{stages}"


def front(card: Card, tables: Tables) -> str:
    """The first page of CARD.md: purpose, figures with what was missed, operating point, data and limits."""
    earlier = len(card.stages) - 1
    started = (
        f"\nIt started from other weights. The end of this card lists {earlier} earlier stages.\n" if earlier else ""
    )
    figures = _table(list(_figures(tables))) if {*tables} & {figure.table for figure in _FIGURES} else ""
    return (
        f"# {card.id}\n\n**{card.intended_use}.**\n\n"
        f"## What it is for\n\n{_words(_PURPOSE)}\n\n"
        f"## What it must not be used for\n\n{_bullets(_MISUSES)}\n"
        f"## The figures that matter\n\n{_words(_FIGURES_SAY)}\n\n{figures}\n"
        f"## Operating point\n\n{_operating_point(card).capitalize()}. {_words(_OPERATING)}\n\n"
        f"## What it learned from\n\n{card.stages[0]}\n{started}\n"
        f"## What it cannot do\n\n{_bullets(card.limits)}\n"
        f"## What the file is\n\n"
        f"| | |\n| --- | --- |\n| variant | {card.variant} |\n"
        f"| training | preset {card.preset}, {card.steps} steps, seed {card.seed} |\n"
        f"| ONNX opset | {card.opset} |\n| contract | {card.contract} |\n"
        f"| SHA-256 of model.onnx | `{card.sha256}` |\n"
    )


def _figures(tables: Tables) -> Iterable[Row]:
    """One row for each figure that the tables hold."""
    for figure in _FIGURES:
        column, value = figure.row
        rows = {row["method"]: row for row in tables.get(figure.table, ()) if row[column] == value}
        if not rows:
            continue
        whole = next((row for row in tables[figure.table] if row["method"] == STANDARD), {})
        network = rows["network"][figure.column]
        yield {
            "figure": figure.words,
            "network": network,
            "linear engine": rows["linear engine"][figure.column],
            "standard dose": whole.get(figure.column, ""),
            "wanted": _wanted(figure),
            "reached": _reached(figure, network),
        }


def _wanted(figure: _Figure) -> str:
    if figure.most is not None:
        return f"at most {figure.most:g}"
    return "" if figure.least is None else f"at least {figure.least:g}"


def _reached(figure: _Figure, found: str) -> str:
    """Whether the network reached what was wanted: its mean, and every value of its interval."""
    if figure.most is None and figure.least is None:
        return ""
    within = [
        (figure.most is None or value <= figure.most) and (figure.least is None or value >= figure.least)
        for value in map(float, re.findall(r"-?\d+\.\d+|nan", found))
    ]
    if not within or not within[0]:
        return "**no**"
    return "yes" if all(within) else "by the mean alone: the interval reaches beyond"


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


_PURPOSE = """
Research on reduced-dose contrast in brain MRI. From a pre-contrast and a low-dose T1 volume of one head it predicts the
contrast signal that the standard dose would have shown. Its result belongs beside the acquired images, never in their
place.
"""
_MISUSES = (
    "diagnosis, treatment or any other decision about a patient",
    "a reason to give a patient less contrast agent",
    "a replacement of an acquired image; what it does not show may still be there, and what it shows may be false",
    "measuring how strongly something enhances: strength is predicted, not measured",
    "acquisitions that it was not trained on, or another organ than the brain: see below what it cannot do",
)
_FIGURES_SAY = """
Mean and 95 % interval over simulated studies that it was not trained on; the real pair is one study and has no
interval. Errors are in units of white matter, where the truth enhances. The standard dose is another scan, smoothed and
gated as in the linear engine. Where the table names a wanted figure, it was set before this network was made.
Half a false component: every method is held to the threshold that leaves that many a study.
"""
_OPERATING = """
A gate decides where signal is shown. A larger offset shows less that is false and misses more that is true.
"""
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
