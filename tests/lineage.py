"""How the weights to start from came to be: the data file beside them, and the words in which checkpoints say it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from models.card import STARTED

ROOT = Path(__file__).parents[1]
START = ROOT / "models" / "training" / "start"
LINEAGE: dict[str, Any] = tomllib.loads((START / "lineage.toml").read_text(encoding="utf-8"))


def told() -> str:
    """All stages as the data of a checkpoint that starts from these weights tells them, the newest first."""
    return STARTED.join(f"{stage['how']}: {stage['data']}" for stage in LINEAGE["stages"])
