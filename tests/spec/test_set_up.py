"""Setting up and packaging: what the targets of make choose and say, and what a wheel holds. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL = ROOT / "deploy" / "install-packages.sh"
BASH = shutil.which("bash") or "/bin/bash"
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def program(folder: Path, name: str, body: str = "") -> None:
    """A stand-in for a program, which notes how it was called."""
    path = folder / name
    path.write_text(f'#!{BASH}\necho "{name} $*" >>"{folder}/called"\n{body}\n')
    path.chmod(0o755)


def called(folder: Path) -> list[str]:
    log = folder / "called"
    return log.read_text().splitlines() if log.exists() else []


def install(folder: Path, *packages: str) -> subprocess.CompletedProcess[str]:
    """Run the script where only the stand-ins exist, as root or not as this test is."""
    command = [BASH, str(INSTALL), *packages]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, check=False)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A Debian with dcmtk installed, whose archive has every package but chromium; `sudo` and `env` just run."""
    program(tmp_path, "dpkg-query", 'if [ "${!#}" = dcmtk ]; then echo -n installed; else exit 1; fi')
    program(tmp_path, "apt-cache", 'if [ "$2" = chromium ]; then exit 100; else echo "Package: $2"; fi')
    program(tmp_path, "apt-get")
    program(tmp_path, "sudo", '"$@"')
    program(tmp_path, "env", '"${@:2}"')
    return tmp_path


def test_packages_that_are_there_are_not_installed_again(machine: Path) -> None:
    done = install(machine, "dcmtk")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not any(line.startswith("apt") for line in called(machine))


def test_what_is_missing_is_named_and_installed_at_once_after_one_update(machine: Path) -> None:
    done = install(machine, "dcmtk", "orthanc", "postgresql")
    assert done.returncode == 0, done.stderr
    assert "orthanc postgresql" in done.stdout
    asked = [line for line in called(machine) if line.startswith("apt-get")]
    assert len(asked) == 2
    assert " update " in f"{asked[0]} "
    assert asked[1].endswith("orthanc postgresql")


def test_a_package_that_the_distribution_lacks_is_named_and_the_others_are_installed(machine: Path) -> None:
    done = install(machine, "chromium", "orthanc")
    assert done.returncode == 0
    assert "chromium" in done.stderr
    assert called(machine)[-1].endswith(" orthanc")


@pytest.mark.parametrize("lost", ["no apt-get", "no network"])
def test_where_nothing_can_be_installed_it_says_what_to_install_by_hand_and_fails(machine: Path, lost: str) -> None:
    (machine / "apt-get").unlink()
    if lost == "no network":
        program(machine, "apt-get", "exit 100")
    done = install(machine, "dcmtk", "orthanc", "postgresql")
    assert done.returncode == 1
    assert "by hand: orthanc postgresql" in done.stderr


def test_without_root_and_sudo_it_says_what_to_install_by_hand(machine: Path) -> None:
    (machine / "sudo").unlink()
    machine.chmod(0o777)
    for folder in machine.parents:
        if folder.name.startswith(("pytest-", "popen-")):  # pytest's own, closed to others
            folder.chmod(0o711)
    script = shutil.copy(INSTALL, machine)
    nobody = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
    command = [BASH, script, "orthanc"]
    done = subprocess.run(command, env={"PATH": str(machine)}, capture_output=True, text=True, check=False, **nobody)
    assert done.returncode == 1
    assert "neither root nor sudo; install by hand: orthanc" in done.stderr


@needs_make
@pytest.mark.parametrize(("has_gpu", "wanted", "unwanted"), [(True, "gpu", "cpu"), (False, "cpu", "gpu")])
def test_a_machine_gets_the_one_onnxruntime_that_fits_and_the_demo_no_torch(
    tmp_path: Path, has_gpu: bool, wanted: str, unwanted: str
) -> None:
    program(tmp_path, "nvidia-smi", "exit 0" if has_gpu else "exit 9")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["make", "--dry-run", "demo"],
        cwd=tmp_path,
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    installs = [line for line in done.stdout.splitlines() if " install " in line]
    assert [line for line in installs if f".[{wanted}]" in line] == installs != []
    assert f".[{unwanted}]" not in done.stdout
    assert "train" not in done.stdout


@needs_make
def test_a_machine_without_a_new_enough_python_is_told_so(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = subprocess.run(
        ["make", ".venv/bin/pip", "PYTHON="], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr


def test_a_wheel_holds_every_module_and_every_data_file(tmp_path: Path) -> None:
    ours = ("service", "worker", "models")
    source = tmp_path / "source"
    for name in ours:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("lowgad.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
    files = {str(path.relative_to(ROOT)) for name in ours for path in (ROOT / name).rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} - packed == set()
    assert "lowgad.py" in packed


def test_receiving_processing_and_simulating_need_neither_torch_nor_onnx() -> None:
    roles = "service.web.api.app, service.dicom.listener"
    modules = f"lowgad, {roles}, worker.app, worker.lab.demo, worker.pipeline, models.runtime"
    look = f"import sys, {modules}; print(sorted({{'torch', 'onnx', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
