"""The validators of dicom3tools: dciodvfy for one object, dcentvfy for several of one patient."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

# dicom3tools of 2022 does not know Synthetic Data, which the standard has since 2023.
KNOWN_ERROR = "Error - </(0008,001c)> - Attribute with an even group number is not a recognized standard attribute"


needs_dicom3tools = pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")


def errors_of(path: Path, iod: str = "") -> list[str]:
    """What dciodvfy calls an error in this file, which is to be of the given IOD."""
    done = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert not iod or iod in lines
    return [line for line in lines if line.startswith("Error") and line != KNOWN_ERROR]


def inconsistencies(paths: Sequence[Path]) -> str:
    """What dcentvfy says of these files together; nothing where they agree."""
    done = subprocess.run(["dcentvfy", *map(str, paths)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
