"""The contracts of pyproject.toml refuse what they forbid: each forbidden import is planted in a copy and linted.

The copy holds the three packages and pyproject.toml. A module that does not exist is made: the file of tomorrow.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[2]
LINTER = Path(sys.executable).with_name("lint-imports")
PACKAGES = ("service", "worker", "models")
# Who imports what; a name with `tomorrow` is of a file that does not exist yet.
FORBIDDEN = [
    "worker.app -> service.supervisor",
    "worker.app -> service.doctor",
    "worker.read.tomorrow -> service.intake",
    "worker.pipeline -> worker.lab",
    "worker.deliver.tomorrow -> worker.lab",
    "worker.compose.derived -> worker.lab.demo",
    "worker.read.tomorrow -> worker.compose",
    "worker.compose.tomorrow -> worker.app",
    "worker.pipeline -> sqlalchemy",
    "worker.pipeline -> fastapi",
    "worker.choose.tomorrow -> pynetdicom",
    "worker.lab.tomorrow -> torch",
    "service.core.dicom.header -> pynetdicom",
    "service.core.dicom.header -> celery",
    "service.core.dicom.header -> redis",
    "service.core.dicom.header -> sqlalchemy",
    "service.core.dicom.tomorrow -> pynetdicom",
    "service.core.dicom.tomorrow -> kombu",
    "service.core.dicom.header -> service.core.ledger",
    "service.core.queue -> fastapi",
    "service.core.queue -> pynetdicom",
    "service.core.errors -> service.core.queue",
    "service.core.ledger.tomorrow -> service.intake",
    "service.intake -> service.web.dashboard",
    "service.intake -> service.supervisor",
    "service.dicom.tomorrow -> service.web",
    "service.dicom.tomorrow -> starlette",
    "service.web.tomorrow -> service.doctor",
    "service.web.tomorrow -> numpy",
    "service.web.tomorrow -> pynetdicom",
    "service.web.tomorrow -> worker.pipeline",
    "service.web.tomorrow -> models.card",
    "models.quality -> models.training",
    "models.runtime -> models.evaluation",
    "models.brain -> models.simulation",
    "models.simulation.tomorrow -> models.training",
    "models.evaluation.tomorrow -> torch",
    "models.runtime -> torch",
    "models.runtime -> pydicom",
    "models.training.tomorrow -> service.core.job",
    "models.runtime -> worker.pipeline",
    "worker.pipeline -> models.training",
    "worker.read.tomorrow -> models.simulation",
    "worker.choose.tomorrow -> celery",
    "service.core.ledger.tomorrow -> redis",
    "worker.read.tomorrow -> kombu",
    "worker.compose.tomorrow -> jinja2",
    "models.simulation.tomorrow -> matplotlib",
    "service.core.ledger.tomorrow -> onnx",
    "service.core.queue -> uvicorn",
    "worker.read.tomorrow -> lowgad",
]
UNPLACED = ["service.tomorrow", "service.core.tomorrow", "worker.tomorrow", "models.tomorrow"]
CIRCLE = ("worker.read.tomorrow -> worker.read.next", "worker.read.next -> worker.read.tomorrow")


@dataclass(frozen=True)
class Report:
    """What lint-imports said: its exit status, and what it wrote about each broken contract, by name."""

    status: int
    broken: dict[str, str]

    @property
    def chains(self) -> list[str]:
        """Each forbidden way, one import or several in a row; circles are told in another form."""
        bullets = re.split(r"^- +", "\n".join(self.broken.values()), flags=re.MULTILINE)[1:]
        return [bullet for bullet in bullets if "(l." in bullet]


def contracts() -> list[str]:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [contract["name"] for contract in configuration["tool"]["importlinter"]["contracts"]]


def plant(folder: Path, rule: str) -> None:
    importer, imported = rule.split(" -> ")
    place = folder.joinpath(*importer.split("."))
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\nimport {imported}\n")


@cache
def linted(*planted: str) -> Report:
    """The report on a copy with these imports."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "pyproject.toml", folder)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=only_python)
        for rule in planted:
            plant(folder, rule)
        environment = os.environ | {"PYTHONPATH": name, "COLUMNS": "1000", "NO_COLOR": "1"}
        command = [LINTER, "--no-cache", "--no-logo"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout.partition("\nBroken contracts\n")[2]
    parts = re.split(rf"^({'|'.join(map(re.escape, contracts()))})\n-+\n", said, flags=re.MULTILINE)
    return Report(done.returncode, dict(zip(parts[1::2], parts[2::2], strict=True)))


def only_python(folder: str, names: list[str]) -> set[str]:
    """What is left out of the copy: weights, templates and caches."""
    return {name for name in names if not name.endswith(".py") and not (Path(folder) / name / "__init__.py").exists()}


def test_with_nothing_planted_every_contract_is_kept() -> None:
    assert linted() == Report(0, {})


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_a_forbidden_import_is_refused_by_name(rule: str) -> None:
    report = linted(rule)
    assert report.status == 1
    assert report.chains
    assert [chain for chain in report.chains if rule not in chain] == []


@pytest.mark.parametrize("module", UNPLACED)
def test_a_file_of_tomorrow_at_the_top_of_a_package_has_to_be_given_its_floor(module: str) -> None:
    report = linted(f"{module} -> service.core.job")
    assert report.status == 1
    assert any(re.search(rf"not listed as layers:\s+- {re.escape(module)}\s", said) for said in report.broken.values())


def test_a_circle_of_two_siblings_is_refused() -> None:
    report = linted(*CIRCLE)
    assert report.status == 1
    [said] = report.broken.values()
    assert "No cycles are allowed in worker.read." in said
    assert re.search(r"- \.(tomorrow -> \.next|next -> \.tomorrow) ", said)


def test_every_contract_refuses_something_that_is_planted_here() -> None:
    reports = [*map(linted, FORBIDDEN), linted(*CIRCLE)]
    refused = {name for report in reports for name in report.broken}
    assert refused == set(contracts())
