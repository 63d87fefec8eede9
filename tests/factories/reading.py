"""Synthetic studies as the worker reads them: written to disk, read, and their pair chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from tests.factories.studies import encode, write_study
from worker.choose.pairing import Pair, choose_pair
from worker.read.study import Study, read_study


def study_of(folder: Path, *series: Sequence[Dataset], **options: Any) -> Study:
    """These series, written into `folder` one file per instance and read again; `options` as for `read_study`."""
    paths = []
    for n, dataset in enumerate(dataset for datasets in series for dataset in datasets):
        paths.append(folder / f"{n:04}.dcm")
        paths[-1].write_bytes(encode(dataset))
    return read_study(paths, **options)


def paired(folder: Path, **options: Any) -> Pair:
    """The pair of the study that `write_study` makes with these options."""
    return choose_pair(read_study(write_study(folder, **options)))
