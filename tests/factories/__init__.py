"""Synthetic studies and what is made of them, for every kind of test.

`studies` and `multiframe` are what a scanner writes, and are to be had from here; `reading` is how the worker sees it
and `results` what it makes of it, imported by their own names, so that a test of the service loads no worker.
"""

from tests.factories.multiframe import as_concatenation, as_enhanced, as_legacy_converted, as_stacks
from tests.factories.studies import (
    ODD_CASES,
    Recipe,
    SyntheticPair,
    another,
    compress_file,
    encode,
    make_localizer,
    make_pair,
    uid,
    write_study,
)

__all__ = [
    "ODD_CASES",
    "Recipe",
    "SyntheticPair",
    "another",
    "as_concatenation",
    "as_enhanced",
    "as_legacy_converted",
    "as_stacks",
    "compress_file",
    "encode",
    "make_localizer",
    "make_pair",
    "uid",
    "write_study",
]
