"""The evaluation of a model folder: fixed seeds, doses, baselines and ablations; tables, figures and CARD.md from them.

Hides the protocol. What is measured is in models.evaluation.metrics; the real pair goes through the same pipeline as a
hospital's study. Must never choose what to report by its result.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from models.card import Card
from models.evaluation import figures
from models.evaluation.ablation import ablations, condition_grid, embedding, variance_shares
from models.evaluation.metrics import (
    FALSE,
    JUDGED_DOSE,
    LARGE,
    Found,
    Interval,
    LesionRange,
    Method,
    Score,
    apply,
    by_study,
    copy_method,
    error_ratio,
    held_out,
    ideal_sensitivity,
    interval,
    lesion_error_ratio,
    linear_method,
    non_local_means_method,
    percent_enhancement,
    raw_method,
    score,
    sensitivity,
    sensitivity_difference,
    summary,
    threshold_at,
    usable_studies,
)
from models.runtime import LinearEngine, NetworkEngine
from models.simulation.samples import TEST_SEED, VALIDATION_SEED, Sample
from models.volume import Array, Mask, Volume
from service.core.job import JobOptions
from worker.lab.evaluation_card import STANDARD, Row, Tested, render
from worker.pipeline import Result, run
from worker.read.study import find_files

DOSES = (0.10, 0.20, 0.25, JUDGED_DOSE, 0.50)
FULL_DOSES = (0.10, JUDGED_DOSE)  # at which every baseline is measured
DIAMETERS = {f"{low:g} to {high:g}": LesionRange(low, high) for low, high in ((1.5, 3), (3, 5), (5, 8), (8, 50))}
ENHANCEMENTS = {
    "0.02 to 0.1": LesionRange(strongest=0.1),
    "0.1 to 0.2": LesionRange(weakest=0.1, strongest=0.2),
    "0.2 to 0.4": LesionRange(weakest=0.2, strongest=0.4),
    "0.4 and more": LesionRange(weakest=0.4),
}
FROC = {
    "lesions found": LesionRange(),
    "found, below 5 mm": LesionRange(largest_mm=5),
    "found, 5 mm and more": LARGE,
    "found, enhancement below 0.2": LesionRange(strongest=0.2),
    "found, 0.2 and more": LesionRange(weakest=0.2),
}
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false components per study of the FROC
OPERATING_RATE = 0.5
ABLATED_PER_DOSE = 4  # studies: all ablations together take as long as the rest
SAME_IMAGE = 0.9  # correlation of a truth's pre-contrast image with the series, which may have its noise besides
SIDE = 64  # voxels of a study's side
KINDS: dict[str, Callable[[Sample], bool]] = {
    "head, whole or defaced": lambda sample: not sample.scenario.stripped,
    "skull-stripped": lambda sample: sample.scenario.stripped,
    "SPGR": lambda sample: sample.scenario.sequence.kind == "SPGR",
    "MPRAGE": lambda sample: sample.scenario.sequence.kind == "MPRAGE",
    "SE": lambda sample: sample.scenario.sequence.kind == "SE",
    "below 2 T": lambda sample: sample.scenario.field_strength_t < 2,
    "2 T and more": lambda sample: sample.scenario.field_strength_t >= 2,
    "noise below 0.03": lambda sample: sample.scenario.sigma < 0.03,
    "noise of 0.03 and more": lambda sample: sample.scenario.sigma >= 0.03,
    "slices up to 1.5 mm": lambda sample: max(sample.scenario.spacing_mm) <= 1.5,
    "thicker slices": lambda sample: max(sample.scenario.spacing_mm) > 1.5,
}
COPY, ACQUIRED = "low-dose copy", "standard dose as acquired"
BASELINES: dict[str, Method] = {
    "linear engine": linear_method,
    COPY: copy_method,
    "raw amplification": raw_method,
    "non-local means": non_local_means_method,
}
Say = Callable[[str], None]
Results = dict[float, dict[str, Found]]  # dose, then method


@dataclass(frozen=True)
class _Studied:
    """The same studies at every dose, and what every method makes of them."""

    beside: tuple[Card, ...]  # of the networks it is compared with
    seeds: list[int]
    refused: int
    samples: dict[float, list[Sample]]
    results: Results
    standard: dict[str, Found]  # the standard dose itself, by how it is treated
    plus: dict[float, Found]  # dose, then what SD+ shows over the pre-contrast image: the signal and the low dose's own

    @property
    def tested(self) -> Tested:
        """For the card."""
        quiet = float(np.mean([sample.quiet.sum() / sample.brain.sum() for sample in self.samples[JUDGED_DOSE]]))
        return Tested(len(self.seeds), self.refused, SIDE, quiet, self.beside)

    def tables(self, say: Say) -> dict[str, list[Row]]:
        """All methods, large lesions, derived series, kinds of studies, lesions of all kinds, FROC, and the seeds."""
        return {
            "methods": _methods(self.results | {1.0: self.standard}, say),
            "large": list(_large(self)),
            "series": list(_series(self)),
            "kinds": list(_kinds(self.samples[JUDGED_DOSE], self.results[JUDGED_DOSE], self.standard[STANDARD])),
            "lesions": list(_lesions(self, "diameter_mm", DIAMETERS)),
            "enhancement": list(_lesions(self, "enhancement", ENHANCEMENTS)),
            "froc": list(_froc(self)),
            "seeds": [{"seed": str(seed)} for seed in self.seeds],
        }


def _study(
    engine: NetworkEngine, against: Sequence[Path], *, studies: int, first: int, say: Say, workers: int
) -> _Studied:
    engines = [*map(NetworkEngine, against)]
    others = {other.name: network_method(other) for other in engines}
    if len(others) < len(engines) or {*others} & {*BASELINES, "network", engine.name}:
        raise ValueError("the models to compare need names of their own: two have one name, or that of a method")
    usable, refused = usable_studies(studies, SIDE, first=first, workers=workers)
    seeds = [*usable]
    say(f"{refused} simulated studies are refused by the quality gate and replaced")
    samples = {dose: held_out(seeds, dose, SIDE, workers=workers) for dose in DOSES if dose != JUDGED_DOSE}
    samples = dict(sorted((samples | {JUDGED_DOSE: [*usable.values()]}).items()))
    whole = held_out(seeds, 1.0, SIDE, workers=workers)
    standard = {STANDARD: apply(whole, linear_method), ACQUIRED: apply(whole, copy_method)}
    signal = network_method(engine)
    plus = {dose: apply(samples[dose], lambda sample: signal(sample) + copy_method(sample)) for dose in FULL_DOSES}
    beside = tuple(other.card for other in engines)
    return _Studied(beside, seeds, refused, samples, _measure(engine, others, samples, say), standard, plus)


def write_card(
    folder: Path,
    *,
    studies: int,
    real: tuple[Path, Path] | None,
    say: Say,
    against: Sequence[Path] = (),
    workers: int = 1,
) -> None:
    """Evaluate a model folder; write its tables and figures into `evaluation/` and CARD.md beside them.

    Args:
        folder: with model.onnx and card.toml.
        studies: simulated studies, the same at every dose.
        real: DICOM folder of a pair and its truth (npz: ce and brain (k, j, i) on the pre-contrast grid in ascending
            slice order, wm: white-matter level, both in stored units).
        say: told every row.
        against: other model folders to measure beside it, for example one trained without conditions.
        workers: processes that simulate.

    Raises:
        ValueError: two models have one name, or that of a method, or the truth does not fit the pair.
        Permanent: the pair cannot be processed.
    """
    engine, out = NetworkEngine(folder), folder / "evaluation"
    out.mkdir(exist_ok=True)
    tables = {"real": real_rows(engine, *real, say)} if real else {}  # first: what cannot be read is said at once
    studied = _study(engine, against, studies=studies, first=TEST_SEED, say=say, workers=workers)
    rescans = {dose: held_out(studied.seeds, 0.0, SIDE, stated=dose, workers=workers) for dose in FULL_DOSES}
    tables |= studied.tables(say) | {
        "rescans": list(_rescans(rescans, engine)),
        "ablations": list(_ablations(studied.samples, engine, say)),
        "embedding": _embedding(engine.card.model_path, out),
    }
    (out / "real.csv").unlink(missing_ok=True)
    _write_tables(out, tables)
    _draw(out, studied, engine)
    (folder / "CARD.md").write_text(render(engine.card, tables, studied.tested), encoding="utf-8")


def write_validation(folder: Path, *, studies: int, say: Say, against: Sequence[Path] = (), workers: int = 1) -> None:
    """Write tables of validation studies into `validation/`: what is chosen, is chosen on these.

    Arguments and errors are those of `write_card`.
    """
    engine, out = NetworkEngine(folder), folder / "validation"
    out.mkdir(exist_ok=True)
    studied = _study(engine, against, studies=studies, first=VALIDATION_SEED, say=say, workers=workers)
    _write_tables(out, studied.tables(say))


def network_method(engine: NetworkEngine) -> Method:
    """The exported network on a sample."""

    def method(sample: Sample) -> Array:
        return engine.run(sample.images.astype(np.float32), sample.condition)

    return method


def _measure(
    engine: NetworkEngine, others: Mapping[str, Method], samples: Mapping[float, Sequence[Sample]], say: Say
) -> Results:
    """Network and linear engine at every dose, everything else at two."""
    methods = {"network": network_method(engine), **BASELINES, **others}
    results: Results = {}
    for dose, studies in samples.items():
        asked = methods if dose in FULL_DOSES else ("network", "linear engine")
        results[dose] = {name: apply(studies, methods[name]) for name in asked}
        say(f"measured {len(studies)} studies at {dose:.0%}")
    return results


def _methods(results: Results, say: Say) -> list[Row]:
    """Means and 95 % intervals over studies, one row for each dose and method."""
    rows: list[Row] = []
    for dose, methods in results.items():
        for name, found in methods.items():
            text = {metric: _text(value) for metric, value in summary(found.scores).items()}
            reference = methods.get("linear engine", found)  # of the standard dose itself there is none
            ratio = "" if reference is found else _text(error_ratio(found.scores, reference.scores))
            rows.append({"dose": f"{dose:.0%}", "method": name, "error_over_linear": ratio, **text})
            say(", ".join(rows[-1].values()))
    return rows


def _kinds(samples: Sequence[Sample], methods: Mapping[str, Found], standard: Found) -> Iterator[Row]:
    """Kinds of studies apart: of anatomy shown, sequence, field strength, noise and slice thickness."""
    linear = methods["linear engine"]
    compared = {"network": methods["network"], "linear engine": linear, STANDARD: standard}
    for kind, belongs in KINDS.items():
        places = [n for n, sample in enumerate(samples) if belongs(sample) and linear.scores[n] is not None]
        if not places:
            continue
        reference = [linear.scores[n] for n in places]
        for name, found in compared.items():
            scores = [found.scores[n] for n in places]
            means = summary(scores)
            yield {
                "kind": kind,
                "studies": str(len(places)),
                "method": name,
                "error_over_linear": "" if found is linear else _text(error_ratio(scores, reference)),
                **{metric: _text(means[metric]) for metric in ("ce_error", "slope", "false_per_ml")},
            }


def _lesions(studied: _Studied, measure: str, ranges: Mapping[str, LesionRange]) -> Iterator[Row]:
    """Lesions by diameter or enhancement: how much of them is recovered, how many are found; an ideal observer."""
    for dose in FULL_DOSES:
        linear = studied.results[dose]["linear engine"]
        for name, found in (studied.results[dose] | studied.standard).items():
            for label, limits in ranges.items():
                some = found.among(limits)
                yield {
                    "dose": f"{dose:.0%}",
                    "method": name,
                    measure: label,
                    "lesions": str(len(some)),
                    "found_above_0.1": _text(sensitivity(found, FALSE, limits)),
                    "found_at_0.5_false": _text(_found_at(OPERATING_RATE, found, limits)),
                    "ideal_observer": f"{ideal_sensitivity(studied.samples[dose], limits):.3f}",
                    "error_over_linear": "" if found is linear else _text(lesion_error_ratio(found, linear, limits)),
                    "recovery": _text(by_study(some, lambda one: one.recovery)),
                    "peak_recovery": _text(by_study(some, lambda one: one.peak_recovery)),
                    "cnr": _text(by_study(some, lambda one: one.cnr)),
                    "lbr": _text(by_study(some, lambda one: one.lbr)),
                    "cep_percent": _text(percent_enhancement(some)),
                }


def _large(studied: _Studied) -> Iterator[Row]:
    """Lesions of 5 mm and more: how many more or fewer of them a method finds than the standard dose does."""
    for dose in FULL_DOSES:
        for name, found in studied.results[dose].items():
            row = {"dose": f"{dose:.0%}", "method": name, "lesions": str(len(found.among(LARGE)))}
            for label, level_of in (("above_0.1", lambda _: FALSE), ("at_0.5_false", _operating_level)):
                row[f"found_{label}"] = _text(sensitivity(found, level_of(found), LARGE))
                for short, name_of in (("standard", STANDARD), ("acquired", ACQUIRED)):
                    other = studied.standard[name_of]
                    more = sensitivity_difference(found, level_of(found), other, level_of(other))
                    row[f"{label}_less_{short}"] = _text(more)
            yield row


def _operating_level(found: Found) -> float:
    return threshold_at(found, OPERATING_RATE)


def _series(studied: _Studied) -> Iterator[Row]:
    """SD, SD+ and what was acquired: how strongly large lesions are shown, and the noise of the image."""
    series = {
        dose: {"SD": studied.results[dose]["network"], "SD+": plus, "low dose as acquired": studied.results[dose][COPY]}
        for dose, plus in studied.plus.items()
    }
    series[1.0] = {ACQUIRED: studied.standard[ACQUIRED]}
    for dose, shown in series.items():
        for name, found in shown.items():
            some = found.among(LARGE)
            yield {
                "dose": f"{dose:.0%}",
                "series": name,
                "lesions": str(len(some)),
                "recovery": _text(by_study(some, lambda one: one.recovery)),
                "cnr": _text(by_study(some, lambda one: one.cnr)),
                "lbr": _text(by_study(some, lambda one: one.lbr)),
                "cep_percent": _text(percent_enhancement(some)),
                "noise": _text(by_study(some, lambda one: one.noise)),
            }


def _froc(studied: _Studied) -> Iterator[Row]:
    """The curves of the FROC, and at what threshold each point lies."""
    for dose in FULL_DOSES:
        for name, found in (studied.results[dose] | studied.standard).items():
            for (label, limits), rate in product(FROC.items(), RATES):
                yield {
                    "dose": f"{dose:.0%}",
                    "method": name,
                    "lesions": label,
                    "false_per_study": f"{rate:g}",
                    "threshold": f"{threshold_at(found, rate):.3f}",
                    "found": _text(_found_at(rate, found, limits)),
                }


def _rescans(rescans: Mapping[float, Sequence[Sample]], engine: NetworkEngine) -> Iterator[Row]:
    """Two scans without contrast, the second said to be of a dose: whatever appears is false."""
    methods: dict[str, Method] = {"network": network_method(engine), "linear engine": linear_method}
    for (dose, samples), (name, method) in product(rescans.items(), methods.items()):
        false, mean = [], []
        for sample in samples:
            inside = method(sample)[sample.brain]
            false.append(float((inside > FALSE).mean() / np.prod(sample.scenario.spacing_mm) * 1000))
            mean.append(float(inside.mean()))
        values = {"false_per_ml": _text(interval(false)), "mean_signal": _text(interval(mean))}
        yield {"said": f"{dose:.0%}", "method": name, **values}


def _ablations(samples: Mapping[float, Sequence[Sample]], engine: NetworkEngine, say: Say) -> Iterator[Row]:
    """CE error without an input over CE error with it, on other studies at each dose."""
    each = min(max(1, len(samples[DOSES[0]]) // len(DOSES)), ABLATED_PER_DOSE)
    pool = [s for n, dose in enumerate(DOSES) for s in samples[dose][n * each : (n + 1) * each]]
    method = network_method(engine)
    whole = apply(pool, method).scores
    for name, changed in ablations(pool):
        scores = apply(changed, method).scores
        ratio = error_ratio(scores, whole)
        said = "yes" if ratio[1] > 1 else "no"
        yield {
            "change": name,
            "error_over_whole": _text(ratio),
            "costs_measurably": said,
            "slope": _text(summary(scores)["slope"]),
            "false_per_ml": _text(summary(scores)["false_per_ml"]),
        }
        say(f"{name}: error x {_text(ratio)}")


def _embedding(model: Path, out: Path) -> list[Row]:
    grid, vectors = condition_grid()
    embedded = embedding(model, vectors)
    figures.draw_embedding(out / "embedding.png", grid, embedded)
    return [
        {"variable": name, "share_of_variance": f"{share:.3f}"}
        for name, share in variance_shares(grid, embedded).items()
    ]


def _text(value: Interval) -> str:
    return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"


def real_rows(engine: NetworkEngine, study: Path, truth: Path, say: Say) -> list[Row]:
    """One row for each engine on a pair whose truth is known, and one for SD+, whose grid is that of the low dose.

    SD minus the pre-contrast image, and SD+ minus the low-dose image, is what the engine added.
    """
    known = _truth(truth)
    network, linear = (run(find_files(study), JobOptions(), one, lambda *_: None) for one in (engine, LinearEngine()))
    known = in_plane_order(known, network.prepared.native_pre.voxels)
    scores = {
        "network": _score_real(network, known),
        "network, SD+": _score_real_plus(network, known),
        "linear engine": _score_real(linear, known),
        "linear engine, SD+": _score_real_plus(linear, known),
    }
    rows: list[Row] = []
    for name, found in scores.items():
        reference = scores[name.replace("network", "linear engine")]
        ratio = "" if found is reference else f"{found.ce_error / reference.ce_error:.3f}"
        values = {metric: f"{value:.3f}" for metric, value in asdict(found).items()}
        rows.append({"data": "real pair", "method": name, "error_over_linear": ratio, **values})
        say(", ".join(rows[-1].values()))
    return rows


def _truth(path: Path) -> dict[str, Array]:
    try:
        with np.load(path) as file:
            known = dict(file)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} is no npz file of arrays") from error
    if missing := {"ce", "brain", "wm"} - {*known}:
        raise ValueError(f"{path.name} lacks {', '.join(sorted(missing))}")
    return known


def in_plane_order(known: dict[str, Array], pre: Array) -> dict[str, Array]:
    """A truth (k, j, i) in the order of our planes: whoever wrote it may have counted them from the other end.

    Args:
        known: of `truth.npz`; its `pre`, the pre-contrast image, tells the order. Without it the order is believed.
        pre: the pre-contrast series as it was read.

    Raises:
        ValueError: neither way round is its image that of the series.
    """
    if "pre" not in known or known["pre"].shape != pre.shape:
        return known
    as_is, flipped = (
        float(np.corrcoef(image.ravel(), pre.ravel())[0, 1]) for image in (known["pre"], known["pre"][::-1])
    )
    if max(as_is, flipped) < SAME_IMAGE:
        raise ValueError(
            f"the truth's pre-contrast image is not that of the series: correlation {max(as_is, flipped):.2f}"
        )
    if as_is >= flipped:
        return known
    return {name: array[::-1] if array.shape == pre.shape else array for name, array in known.items()}


def _score_real(result: Result, known: Mapping[str, Array]) -> Score:
    """On the pre-contrast grid, where the truth is."""
    signal = result.prepared.signal_on_pre(result.signal) / float(known["wm"])
    if signal.shape != known["ce"].shape:
        raise ValueError(f"the truth is {known['ce'].shape} voxels, the pre-contrast series {signal.shape}")
    return _score_known(signal, known["ce"] / np.float32(known["wm"]), known["brain"] > 0, result.prepared.native_pre)


def _score_real_plus(result: Result, known: Mapping[str, Array]) -> Score:
    """On the low-dose grid, to which the truth is carried as the signal is."""
    prepared = result.prepared

    unit: Array = np.maximum(prepared.signal_on_low(np.ones_like(result.signal)), np.float32(1e-6))

    def carried(native: Array) -> Array:
        image = prepared.native_pre.with_voxels(native.astype(np.float32)).to_sitk()
        working = sitk.GetArrayFromImage(sitk.Resample(image, prepared.pre.to_sitk()))
        return (prepared.signal_on_low(working) / unit).astype(np.float32)

    signal = (prepared.signal_on_low(result.signal) / unit).astype(np.float32)
    truth = carried(known["ce"] / np.float32(known["wm"]))
    return _score_known(signal, truth, carried(known["brain"]) > 0.5, prepared.native_low)


def _score_known(signal: Array, truth: Array, brain: Mask, grid: Volume) -> Score:
    scores = score(signal, truth, brain, grid.spacing_mm)
    if scores is None:
        raise ValueError("nothing enhances in the truth of the real pair")
    return scores


def _write_tables(out: Path, tables: Mapping[str, Sequence[Row]]) -> None:
    for name, rows in tables.items():
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _draw(out: Path, studied: _Studied, engine: NetworkEngine) -> None:
    results, samples = studied.results, studied.samples
    sweep: dict[str, dict[str, dict[float, Interval]]] = {"ce_error": {}, "slope": {}, "false_per_ml": {}}
    for metric, curves in sweep.items():
        for name in ("network", "linear engine"):
            curves[name] = {100 * dose: summary(found[name].scores)[metric] for dose, found in results.items()}
    figures.draw_curves(out / "dose.png", list(sweep.items()), "dose, % of standard")
    for dose in FULL_DOSES:
        shown = {"network": results[dose]["network"], "linear engine": results[dose]["linear engine"]}
        shown[STANDARD] = studied.standard[STANDARD]
        bars = {
            name: [_found_at(OPERATING_RATE, found, limits) for limits in DIAMETERS.values()]
            for name, found in shown.items()
        }
        bars["ideal observer"] = [(ideal_sensitivity(samples[dose], limits),) * 3 for limits in DIAMETERS.values()]
        names = [f"{label} mm" for label in DIAMETERS]
        label = f"found at {OPERATING_RATE:g} false per study, {dose:.0%}"
        figures.draw_bars(out / f"detection_{100 * dose:.0f}.png", names, bars, label)
        panels = []
        for label, limits in FROC.items():
            curves = {name: {rate: _found_at(rate, found, limits) for rate in RATES} for name, found in shown.items()}
            curves["ideal observer"] = dict.fromkeys(RATES, (ideal_sensitivity(samples[dose], limits),) * 3)
            panels.append((label, curves))
        figures.draw_curves(
            out / f"froc_{100 * dose:.0f}.png", panels, "false components of 2 mm and more per study", log=True
        )
    figures.draw_examples(out / "examples.png", [_example(sample, engine) for sample in samples[JUDGED_DOSE][:5]])


def _found_at(rate: float, found: Found, limits: LesionRange) -> Interval:
    """Share of the lesions of a range that are found at so many false components per study."""
    return sensitivity(found, threshold_at(found, rate), limits)


def _example(sample: Sample, engine: NetworkEngine) -> dict[str, Array]:
    """The slice with most lesion, or most enhancement where there is none."""
    truth = sample.truth.astype(np.float32)
    weight = (sample.labels > 0).sum(axis=(1, 2)) + 1e-3 * truth.sum(axis=(1, 2))
    k = int(np.argmax(ndimage.uniform_filter1d(weight, 3)))
    images = {
        "pre": sample.images[1].astype(np.float32),
        "raw amplification": raw_method(sample),
        "linear engine": linear_method(sample),
        "network": network_method(engine)(sample),
        "truth": truth,
    }
    return {name: image[k] for name, image in images.items()}
