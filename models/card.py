"""The model card: what a model folder holds, how it was made, and whether it may be loaded.

Hides the file format: card.toml beside model.onnx and, where it was exported, model-fp16.onnx. Must never accept a
network whose digest, opset or contract version differs from what its card says, nor a card that does not say what the
model was trained on.
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
DEFAULT_MODEL = "small-12"
STARTED = ", started from "  # in `training_data`, between a stage and the one before it


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
    gate_offset: float  # what is taken from the logit of the gate, from `gate_strict_from` of the dose on
    halo_voxels: int  # beyond which voxels do not influence each other
    stride: int  # volumes are padded to multiples of this
    limits: tuple[str, ...]
    folder: Path
    gate_strict_from: float = 0.0  # below it in proportion to the dose
    parity: float | None = (
        None  # largest difference of model.onnx from torch in fp32, white matter = 1; None: not stated
    )
    sha256_fp16: str | None = None  # of model-fp16.onnx: weights and activations fp16, inputs, outputs and bound fp32
    parity_fp16: float | None = None  # its largest difference from torch in fp32, measured on the CPU

    @property
    def model_path(self) -> Path:
        """The fp32 network beside the card."""
        return self.folder / "model.onnx"

    @property
    def digest(self) -> str:
        """SHA-256 of card.toml."""
        return sha256_of(self.folder / "card.toml")

    @property
    def stages(self) -> list[str]:
        """What it was trained on, each stage started from the next."""
        return self.training_data.split(STARTED)

    @property
    def networks(self) -> dict[str, tuple[Path, str]]:
        """Precision to file and SHA-256: fp32 always, fp16 where the card offers it."""
        offered = {"fp32": (self.model_path, self.sha256)}
        if self.sha256_fp16 is not None:
            offered["fp16"] = (self.folder / "model-fp16.onnx", self.sha256_fp16)
        return offered


def read_card(folder: Path) -> Card:
    """Read and check a model folder.

    Raises:
        ModelError: a file is missing or unreadable, the card does not say what the model was trained on, its tiles
            would not fit the strides of the network, the digest of a network differs, or the contract is another one.
    """
    values = _values(folder)
    if (contract := values.get("contract")) not in {None, CONTRACT_VERSION}:  # another contract may have another card
        raise ModelError(f"model {values.get('id')}: made for contract {contract}, this is {CONTRACT_VERSION}")
    try:
        typed = {"limits": tuple(values.get("limits", ())), "gate_offset": float(values["gate_offset"])}
        typed["gate_strict_from"] = float(values.get("gate_strict_from", 0))
        card = Card(**{**values, **typed}, folder=folder)
        found = {path.name: (sha256_of(path), said) for path, said in card.networks.values()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _incomplete(folder, error) from error
    if card.halo_voxels % card.stride:
        raise ModelError(f"model {card.id}: halo_voxels {card.halo_voxels} is no multiple of the stride {card.stride}")
    if not card.training_data.strip():
        raise ModelError(f"model {card.id}: the card does not say what it was trained on")
    for name, (digest, said) in found.items():
        if digest != said:
            raise ModelError(f"model {card.id}: {name} has SHA-256 {digest[:12]}, the card says {said[:12]}")
    return card


def _values(folder: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((folder / "card.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _incomplete(folder, error) from error


def _incomplete(folder: Path, error: Exception) -> ModelError:
    return ModelError(f"model folder {folder.name!r} is incomplete: {type(error).__name__}")


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
