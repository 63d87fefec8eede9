"""The command line, and the only place where service, worker and models meet.

Hides how the parts are put together: settings are read here, once, and handed down. Must never hold logic of its own.
Exit codes: 0 done, 1 error, 2 usage, 3 needs review, 4 rejected.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.core.errors import LowgadError, Permanent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from models.runtime import Engine
    from models.simulation.samples import Block
    from service.core.job import Stage
    from service.core.ledger import Ledger
    from service.core.settings import Settings
    from worker.compose.context import Outputs

STUDY = click.Path(exists=True, file_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
supervised_option = click.option("--supervised", is_flag=True, hidden=True, help="Started by `lowgad up`.")


@click.group()
@click.version_option(package_name="lowgad")
def main() -> None:
    """Predict standard-dose contrast enhancement from reduced-dose brain MRI. Research use only."""


@main.command()
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder for everything that is kept.")
def up(data_dir: Path | None) -> None:
    """Run everything on this machine: listener, web interface and workers."""
    from service.core import telemetry
    from service.supervisor import Child, StartError, supervise

    telemetry.configure()
    environ = dict(os.environ) | ({"LOWGAD_DATA_DIR": str(data_dir)} if data_dir else {})
    settings = _settings(environ)
    _open_ledger(settings).close()
    command = [sys.executable, "-m", "lowgad"]
    children = [
        Child("listener", [*command, "listen", "--supervised"], port_variable="LOWGAD_LISTEN_PORT"),
        Child("web", [*command, "api", "--supervised"], port_variable="LOWGAD_API_PORT"),
        Child("process", [*command, "work", "--queue", "process", "--supervised"]),
        Child("deliver", [*command, "work", "--queue", "deliver", "--supervised"]),
    ]

    def announce(ports: Mapping[str, int | None]) -> None:
        click.echo(f"DICOM   {settings.ae_title}@{settings.listen_host}:{ports['listener']}")
        click.echo(f"Web     http://{settings.api_host}:{ports['web']}/")
        click.echo(f"Data    {settings.data_dir.absolute()}")
        click.echo("lowgad is ready")

    try:
        supervise(children, environ, announce, _stop_on_signal())
    except StartError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@supervised_option
def listen(*, supervised: bool) -> None:
    """Receive DICOM and start jobs."""
    from service.core import telemetry
    from service.core.queue import make_celery
    from service.core.spool import Spool
    from service.dicom.commitment import StorageCommitment
    from service.dicom.listener import Listener
    from service.intake import Intake
    from service.supervisor import report_ready

    telemetry.configure()
    settings, stop = _settings(os.environ), _stop_on_signal(supervised=supervised)
    spool = Spool(settings.spool_dir, settings.disk_low_bytes)
    with _open_ledger(settings) as ledger:
        intake = Intake(settings, ledger, spool, make_celery(settings))
        commitment = StorageCommitment(settings, ledger, spool)
        listener = Listener(settings, intake, spool, commitment)
        try:
            port = listener.start()
        except OSError as error:
            where = f"{settings.listen_host}:{settings.listen_port}"
            raise click.ClickException(f"cannot listen on {where}: {error.strerror}") from None
        report_ready(sys.stdout, port)
        reports = threading.Thread(target=commitment.report_until, args=(stop,), name="commitment", daemon=True)
        reports.start()
        intake.sweep_until(stop)
        listener.stop()


@main.command()
@supervised_option
def api(*, supervised: bool) -> None:
    """Serve the REST interface and the dashboard."""
    import socket

    import uvicorn

    from service.core import telemetry
    from service.core.queue import make_celery
    from service.core.spool import Spool
    from service.supervisor import report_ready
    from service.web.api.app import create_app

    telemetry.configure()
    settings = _settings(os.environ)
    _stop_on_signal(supervised=supervised)
    spool = Spool(settings.spool_dir, settings.disk_low_bytes)
    with _open_ledger(settings) as ledger:
        app = create_app(settings, ledger, spool, make_celery(settings))
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=10)
        try:
            door = socket.create_server((settings.api_host, settings.api_port), backlog=128)
        except OSError as error:
            where = f"{settings.api_host}:{settings.api_port}"
            raise click.ClickException(f"cannot listen on {where}: {error.strerror}") from None
        report_ready(sys.stdout, door.getsockname()[1])
        uvicorn.Server(config).run(sockets=[door])


@main.command()
@click.option("--queue", "queues", multiple=True, type=click.Choice(["process", "deliver"]), help="Only this queue.")
@supervised_option
def work(queues: tuple[str, ...], *, supervised: bool) -> None:
    """Compute and deliver: one job at a time of each queue."""
    from celery import signals

    from service.core import telemetry
    from service.supervisor import report_ready
    from worker.app import make_app
    from worker.pipeline import run

    telemetry.configure()
    settings = _settings(os.environ)
    _stop_on_signal(supervised=supervised)

    def say_ready(**_: object) -> None:
        report_ready(sys.stdout)

    signals.worker_ready.connect(say_ready)
    signals.setup_logging.connect(_leave_logging_alone)
    compute = functools.partial(
        run, allow_unknown=settings.allow_unknown, rules=settings.protocols, outputs=_outputs(settings)
    )
    app = make_app(settings, compute, lambda name: _engine(settings, name))
    names = ",".join(queues or ("process", "deliver"))
    # solo: engines do not survive a fork, and one process is one job at a time.
    app.worker_main(["--quiet", "worker", "--pool", "solo", "--queues", names, "--without-gossip", "--without-mingle"])


@main.command()
def doctor() -> None:
    """Check that everything lowgad needs is there; exit status 1 when something is missing."""
    from service.doctor import checks
    from service.probes import Probe, examine

    settings = _settings(os.environ)
    to_check = [
        Probe("settings", lambda: "are valid"),
        *checks(settings),
        Probe("protocols", lambda: _protocols(settings)),
        Probe("model", lambda: _model(settings)),
    ]
    failures = 0
    for finding in examine(to_check):
        failures += not finding.ok
        click.echo(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.detail}")
    sys.exit(1 if failures else 0)


@main.command()
@click.argument("study", type=STUDY)
@click.option("--out", type=FOLDER, required=True, help="Folder for the results, report.json and montage.png")
@click.option("--engine", type=click.Choice(["network", "linear"]), help="Default: the setting LOWGAD_ENGINE")
@click.option("--pre-series", "pre_series_uid", help="SeriesInstanceUID of the pre-contrast series")
@click.option("--low-series", "low_series_uid", help="SeriesInstanceUID of the low-dose series")
def run(study: Path, out: Path, engine: str | None, pre_series_uid: str | None, low_series_uid: str | None) -> None:
    """Process the DICOM files of one STUDY folder without any server."""
    from service.core.job import JobOptions
    from worker.compose.files import write_result
    from worker.lab.montage import write_montage
    from worker.pipeline import run as run_pipeline
    from worker.read.study import find_files

    settings = _settings(os.environ)
    options = JobOptions(engine or settings.engine, pre_series_uid, low_series_uid)
    _clear(out)
    with _outcome(out), _progress() as progress:
        result = run_pipeline(
            find_files(study), options, _engine(settings, options.engine), progress,
            allow_unknown=settings.allow_unknown, rules=settings.protocols, outputs=_outputs(settings),
        )  # fmt: skip
        write_result(result.series, result.report, out)
        write_montage(result.prepared, result.signal, out / "montage.png")
    click.echo(f"{sum(map(len, result.series.values()))} derived instances in {out}")


@main.command()
@click.argument("study", type=STUDY)
@click.option("--pre-series", "pre_series_uid", help="SeriesInstanceUID of the pre-contrast series")
@click.option("--low-series", "low_series_uid", help="SeriesInstanceUID of the low-dose series")
def explain(study: Path, pre_series_uid: str | None, low_series_uid: str | None) -> None:
    """Say which series of a STUDY folder would be used and why, and every acquisition value; process nothing."""
    from service.core.job import JobOptions
    from worker.choose.explain import explain as lines_of
    from worker.choose.explain import reason_in_words
    from worker.read.study import find_files

    settings = _settings(os.environ)
    options = JobOptions(settings.engine, pre_series_uid, low_series_uid)
    try:
        for line in lines_of(find_files(study), options, settings.protocols, settings.allow_unknown):
            click.echo(line)
    except Permanent as error:
        click.echo("\n  ".join(reason_in_words(error)))
        sys.exit(error.reason.outcome.value)
    click.echo("The study would be processed; its images are judged then")


@main.command()
@click.argument("out", type=FOLDER)
@click.option("--seed", type=int, required=True, help="Everything random follows from it")
@click.option("--dose", "dose_fraction", type=click.FloatRange(0.02, 1.0), help="Fraction of the standard dose")
@click.option("--field", "field_strength_t", type=click.FloatRange(0.5, 7.0), help="Tesla")
@click.option("--spacing", "spacing_mm", type=click.FloatRange(0.5, 4.0), default=1.0, show_default=True, help="mm")
@click.option("--noise", type=click.FloatRange(0.0, 0.2), help="Of one image, white matter = 1")
@click.option("--stripped/--full-head", default=False, help="Remove everything outside the brain")
@click.option("--standard", is_flag=True, help="Write a series of the standard dose, too: a study to train on")
def simulate(out: Path, seed: int, spacing_mm: float, stripped: bool, standard: bool, **chosen: float | None) -> None:
    """Write a DICOM study of a digital phantom into OUT, with its truth."""
    import numpy as np

    from models.simulation.phantom import make_phantom
    from models.simulation.scenario import draw_scenario, with_choices
    from worker.lab.phantom_study import write_phantom_study

    drawn = draw_scenario(np.random.default_rng(seed))
    scenario = with_choices(drawn, spacing_mm=(spacing_mm,) * 3, stripped=stripped, **chosen)
    shape = tuple(round(extent / spacing_mm) for extent in (190, 240, 200))
    phantom = make_phantom(seed, shape=shape, scenario=scenario, whole=True, standard=standard)  # type: ignore[arg-type]
    count = write_phantom_study(phantom, seed, out)
    click.echo(f"{count} instances and truth.npz in {out}: {scenario.summary}")


@main.command()
@click.option("--out", type=FOLDER, default="demo-out", show_default=True, help="Folder for everything it makes")
def demo(out: Path) -> None:
    """See the main job: a simulated study in by C-STORE, derived series out, and a picture."""
    from worker.lab.demo import DemoError, demonstrate

    try:
        demonstrate(out, os.environ, click.echo)
    except DemoError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.option(
    "--preset", default="small-cpu", show_default=True, help="smoke, small-cpu, small-gpu, small-tune or base-gpu"
)
@click.option("--steps", type=click.IntRange(1), help="Other than the preset's; may grow when a run goes on")
@click.option("--seed", type=click.IntRange(1), help="Other than the preset's: other studies, other patches")
@click.option("--out", type=FOLDER, required=True, help="Folder of the run; an earlier part of it is gone on with")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that simulate")
@click.option(
    "--data", type=STUDY, help="Studies of your own, each with pre/, low/ and standard/, instead of simulated ones"
)
@click.option("--start", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Checkpoint to fine-tune")
@click.option("--unconditioned", is_flag=True, help="Tell it nothing of the acquisition: a baseline")
@click.option(
    "--target",
    default="truth",
    show_default=True,
    help="Of simulated studies: truth, or for comparison the standard dose as acquired: masked, measured",
)
def train(
    preset: str,
    steps: int | None,
    seed: int | None,
    out: Path,
    workers: int,
    *,
    data: Path | None,
    start: Path | None,
    unconditioned: bool,
    target: str,
) -> None:
    """Train a network on simulated studies, or on your own (needs the extra `train`)."""
    from dataclasses import replace

    from models.training.curves import draw_curves
    from models.training.site import hold_out
    from models.training.train import PRESETS, check
    from models.training.train import train as run_training

    if preset not in PRESETS:
        raise click.BadParameter(f"known presets: {', '.join(PRESETS)}", param_hint="--preset")
    usual = PRESETS[preset]
    config = replace(
        usual,
        preset=preset,
        steps=steps or usual.steps,
        seed=seed or usual.seed,
        conditioned=not unconditioned,
        target=target,
    )
    try:
        check(config, site=data is not None)
        source = hold_out(_triplets(data)) if data else None
        run_training(config, out, workers=workers, report=click.echo, source=source, start=start)
        draw_curves(out / "log.csv", out / "curves.png")
    except ValueError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Checkpoint to write")
def average(checkpoints: tuple[Path, ...], out: Path) -> None:
    """Average the weights of CHECKPOINTS, of runs from one start (needs the extra `train`)."""
    from models.training.average import average as run_average

    try:
        run_average(checkpoints, out)
    except ValueError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=FOLDER)
@click.option("--id", "model_id", required=True, help="Name of the model")
@click.option(
    "--gate-offset",
    type=float,
    help="Operating point, else that of training: larger is stricter; in proportion below .33 of the standard dose",
)
@click.option("--fp16", is_flag=True, help="A half-precision network too, which CUDA then runs")
def export(checkpoint: Path, folder: Path, model_id: str, *, gate_offset: float | None, fp16: bool) -> None:
    """Export a CHECKPOINT to the model FOLDER and prove it against torch (needs the extra `train`)."""
    from models.training.export import export as run_export

    try:
        difference = run_export(checkpoint, folder, model_id=model_id, gate_offset=gate_offset, half=fp16)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{folder}: largest difference between torch and ONNX Runtime {difference:.1e}")


@main.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=FOLDER, required=True, help="Model folder to write")
def convert(source: Path, out: Path) -> None:
    """Convert deepbet's brain extractor from SOURCE, its wheel or an unpacked one (needs the extra `train`)."""
    from models.training.extractor import convert as run_conversion

    try:
        parity = run_conversion(source, out).parity
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: largest difference of a probability from TorchScript {max(parity.values()):.1e}")


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--studies", type=click.IntRange(2), default=40, show_default=True, help="Simulated, held out")
@click.option("--real", type=STUDY, help="DICOM study of a pair whose truth is known")
@click.option("--truth", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="truth.npz of --real")
@click.option("--against", type=FOLDER, multiple=True, help="Another model folder, measured beside it")
@click.option("--validation", is_flag=True, help="On other studies, to choose by; writes FOLDER/validation alone")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that simulate")
def evaluate(
    folder: Path,
    studies: int,
    real: Path | None,
    truth: Path | None,
    *,
    against: tuple[Path, ...],
    validation: bool,
    workers: int,
) -> None:
    """Compare the model in FOLDER with the linear engine and others; write FOLDER/CARD.md and FOLDER/evaluation."""
    from worker.lab.evaluation import write_card, write_validation

    if (real is None) != (truth is None):
        raise click.UsageError("--real and --truth belong together")
    if validation and real:
        raise click.UsageError("--validation is of simulated studies")
    try:
        if validation:
            write_validation(folder, studies=studies, say=click.echo, against=against, workers=workers)
        else:
            pair = (real, truth) if real and truth else None
            write_card(folder, studies=studies, real=pair, say=click.echo, against=against, workers=workers)
    except (Permanent, ValueError) as error:
        raise click.ClickException(str(error)) from None


def _triplets(folder: Path) -> dict[str, list[Block]]:
    from worker.lab.triplets import read_triplets

    return read_triplets(folder, click.echo, _settings(os.environ).protocols).patients


def _settings(environ: Mapping[str, str]) -> Settings:
    from service.core.settings import Settings, SettingsError

    try:
        return Settings.load(environ)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None


def _open_ledger(settings: Settings) -> Ledger:
    from service.core.ledger import Ledger, LedgerError, kind_of

    try:
        return Ledger.open(settings.ledger_url)
    except (LedgerError, OSError) as error:
        raise click.ClickException(f"the database cannot be opened ({kind_of(error)})") from None


def _engine(settings: Settings, name: str) -> Engine:
    from models.card import ModelError
    from models.runtime import LinearEngine, NetworkEngine
    from service.core.errors import Reason

    if name == "linear":
        return LinearEngine()
    try:
        return NetworkEngine(_model_folder(settings))
    except ModelError as error:
        raise Permanent(Reason.MODEL_INVALID, str(error)) from error


def _outputs(settings: Settings) -> Outputs:
    """What the site wants of each job."""
    from worker.compose.context import Outputs

    return Outputs(settings.results, settings.watermark, settings.dose_factor, settings.segmentation_threshold)


def _protocols(settings: Settings) -> str:
    """What the doctor says about the site's protocols, which were valid when the settings were read."""
    from service.probes import ProbeFailedError
    from worker.read.injection import faults_of

    if fault := next(faults_of(settings.protocols), None):
        raise ProbeFailedError(fault)
    return f"{len(settings.protocols)} in the site file"


def _model(settings: Settings) -> str:
    """What the doctor says about the model: its card is read, its digest checked, and it is loaded."""
    from models.card import ModelError, read_card
    from models.extractor import Extractor
    from models.runtime import NetworkEngine
    from service.probes import ProbeFailedError

    try:
        Extractor()
        card = read_card(_model_folder(settings))
        engine = NetworkEngine(card.folder)
    except ModelError as error:
        raise ProbeFailedError(str(error)) from None
    return f"{card.id} {card.version} on {engine.provider}"


def _model_folder(settings: Settings) -> Path:
    """The site's model, or the one that is bundled."""
    from models.card import DEFAULT_MODEL, ZOO

    return settings.model_dir or ZOO / DEFAULT_MODEL


def _clear(out: Path) -> None:
    """An earlier result must not stand beside the reason why this run gave none."""
    from worker.compose.files import remove_result

    remove_result(out)
    (out / "montage.png").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def _outcome(out: Path) -> Iterator[None]:
    """A named reason becomes report.json, one line on standard error and the exit code."""
    from worker.compose.files import write_report
    from worker.compose.report import report_refusal

    try:
        yield
    except LowgadError as error:
        reason = error.reason
        write_report(report_refusal(error), out)
        click.echo(f"lowgad: {reason.outcome.name} {reason.name}: {reason.text} {error.detail}".rstrip(), err=True)
        sys.exit(reason.outcome.value)
    except OSError as error:
        _clear(out)
        raise click.ClickException(f"the result could not be written or the study not read: {error}") from None


@contextmanager
def _progress() -> Iterator[Callable[[Stage, float], None]]:
    """A progress bar on standard error, silent where that is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("read", total=1.0)
        yield lambda stage, done: bar.update(task, description=stage.value, completed=done)


def _stop_on_signal(*, supervised: bool = False) -> threading.Event:
    """An event that SIGTERM and SIGINT set; under `lowgad up` also the end of standard input."""
    from service.supervisor import stop_with_parent

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if supervised:
        stop_with_parent(sys.stdin, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return stop


def _leave_logging_alone(**_: object) -> None:
    """Celery sets up logging of its own unless somebody answers its signal."""


if __name__ == "__main__":
    main()
