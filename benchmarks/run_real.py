"""How long `lowgad run` takes for one study, and how much memory, for both engines: whole processes, several runs.

    python benchmarks/run_real.py STUDY_DIR [--runs N] [--cpus 0,1]

Prints wall-clock seconds and peak memory (minimum, median, maximum) and the ratio network over linear, run by run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def measure(study: Path, engine: str) -> tuple[float, float]:
    """Seconds and peak MiB of one process."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "lowgad", "run", str(study), "--out", out, "--engine", engine]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"lowgad run ended with {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def show(name: str, unit: str, values: Sequence[float]) -> None:
    """One line: minimum, median, maximum."""
    low, middle, high = min(values), statistics.median(values), max(values)
    print(f"{name:<24} {low:8.1f} {middle:8.1f} {high:8.1f} {unit}")


def main() -> None:
    """Measure both engines in turn, so that a drift of the machine meets both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("study", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cpus", default="0,1", help="processors to use")
    options = parser.parse_args()
    os.sched_setaffinity(0, {int(cpu) for cpu in options.cpus.split(",")})
    pairs = [(measure(options.study, "network"), measure(options.study, "linear")) for _ in range(options.runs)]
    print(f"{len(os.sched_getaffinity(0))} processors, {options.runs} runs of each; minimum, median, maximum")
    for index, engine in enumerate(("network", "linear")):
        show(f"{engine} wall", "s", [pair[index][0] for pair in pairs])
        show(f"{engine} peak memory", "MiB", [pair[index][1] for pair in pairs])
    show("network / linear wall", "", [pair[0][0] / pair[1][0] for pair in pairs])


if __name__ == "__main__":
    main()
