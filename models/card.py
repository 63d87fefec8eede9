"""The model card: what a model folder holds, how it was made, and whether it may be loaded.

Hides the file format (card.toml beside model.onnx). Must never accept a model whose digest, opset or contract version
differs from what its card says, nor a card that does not say what the model was trained on.
"""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.condition import CONTRACT_VERSION

RESEARCH_USE = "research use, trained on simulated data, not a medical device"
ZOO = Path(__file__).parent / "zoo"
DEFAULT_MODEL = "small-1"


class ModelError(ValueError):
    """The model folder cannot be used; the message says which check failed."""


@dataclass(frozen=True)
class Card:
    """What is said about a model, read from card.toml and checked against model.onnx."""

    id: str
    version: str
    contract: int
    opset: int
    sha256: str  # of model.onnx
    variant: str
    training_data: str
    intended_use: str
    preset: str
    steps: int
    seed: int
    gate_offset: float  # taken from the network's gate at export: fewer false voxels for more missed ones
    halo_voxels: int  # beyond which voxels do not influence each other
    stride: int  # volumes are padded to multiples of this
    limits: tuple[str, ...]
    folder: Path

    @property
    def model_path(self) -> Path:
        """The network beside the card."""
        return self.folder / "model.onnx"


def read_card(folder: Path) -> Card:
    """Read and check a model folder.

    Raises:
        ModelError: a file is missing or unreadable, the digest of model.onnx differs, or the contract is another one.
    """
    try:
        values: dict[str, Any] = tomllib.loads((folder / "card.toml").read_text(encoding="utf-8"))
        card = Card(**{**values, "limits": tuple(values.get("limits", ()))}, folder=folder)
        digest = hashlib.sha256(card.model_path.read_bytes()).hexdigest()
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ModelError(f"model folder {folder.name!r} is incomplete: {type(error).__name__}") from error
    if digest != card.sha256:
        raise ModelError(f"model {card.id}: model.onnx has SHA-256 {digest[:12]}, the card says {card.sha256[:12]}")
    if card.contract != CONTRACT_VERSION:
        raise ModelError(f"model {card.id}: made for contract {card.contract}, this is {CONTRACT_VERSION}")
    return card
