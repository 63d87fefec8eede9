"""Export: a checkpoint becomes a model folder (model.onnx and card.toml) that proves itself against torch.

Must never write a folder whose ONNX network differs from the checkpoint by more than 1e-4 on a volume of another size
than the one it was traced with.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import torch

from models.card import RESEARCH_USE
from models.condition import CONTRACT_VERSION, NAMES
from models.training.network import GATE, STRIDE, VARIANTS, Network
from models.volume import Array

OPSET = 18
HALO = {"small": 36, "base": 56}
LIMITS = (
    "lesions below 3 mm are often missed or blurred at doses of a third and less; that limit is physics",
    "no clinical validation: trained on simulated studies, tested on those and on one real pair of simulated dose",
    "negative enhancement (T2* shortening) is not predicted",
)


class ParityError(ValueError):
    """The exported network does not agree with the checkpoint."""


def load_network(checkpoint: Path) -> tuple[Network, dict[str, object]]:
    """The averaged network of a checkpoint, in evaluation mode, and the configuration of its run."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    config = {**saved["config"], "steps": saved["step"]}
    network = Network(VARIANTS[str(config["variant"])])
    network.load_state_dict(saved["average"])
    return network.eval(), config


def export(checkpoint: Path, folder: Path, *, model_id: str, preset: str, gate_offset: float = 0.0) -> float:
    """Write a model folder.

    Args:
        checkpoint: of `models.training.train`.
        folder: created; existing files are replaced.
        model_id: name of the model.
        preset: name of the training preset, for the card.
        gate_offset: the operating point: taken from the logit of the gate, so that fewer voxels falsely enhance and
            more are missed. To be chosen on the validation set.

    Returns:
        The largest difference between torch and ONNX Runtime.

    Raises:
        ParityError: that difference exceeds 1e-4.
    """
    network, config = load_network(checkpoint)
    with torch.no_grad():
        for name, parameter in network.head.named_parameters():
            if name == "bias":
                parameter[GATE] -= gate_offset
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    example = (torch.rand(1, 3, 32, 32, 32), torch.zeros(1, len(NAMES)))
    sides = {2: "k", 3: "j", 4: "i"}
    with warnings.catch_warnings():  # torch is pinned; its newer exporter would add onnxscript for the same graph
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            example,
            str(path),
            input_names=["images", "condition"],
            output_names=["signal"],
            dynamic_axes={"images": sides, "signal": sides},
            opset_version=OPSET,
            dynamo=False,
        )
    _sign(path)
    difference = parity(network, path)
    if difference > 1e-4:
        raise ParityError(f"torch and ONNX Runtime differ by {difference:.2e}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "card.toml").write_text(
        _card(model_id, preset, config | {"gate_offset": gate_offset}, digest), encoding="utf-8"
    )
    return difference


def _sign(path: Path) -> None:
    """Write opset and contract into the network itself, where loading can compare them with the card."""
    import onnx  # noqa: PLC0415  export alone needs it

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"opset": str(OPSET), "contract": str(CONTRACT_VERSION)})
    onnx.save(model, path)


def parity(network: Network, path: Path) -> float:
    """Largest difference between torch and ONNX Runtime on a random volume of uneven shape."""
    import onnxruntime  # noqa: PLC0415  training alone does not need it

    rng = np.random.default_rng(0)
    images: Array = rng.normal(0.1, 0.2, (1, 3, 24, 40, 28)).astype(np.float32)
    condition = rng.normal(0, 0.5, (1, len(NAMES))).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    there = session.run(["signal"], {"images": images, "condition": condition})[0]
    with torch.no_grad():
        here = network(torch.from_numpy(images), torch.from_numpy(condition)).numpy()
    return float(np.abs(here - there).max())


def _card(model_id: str, preset: str, config: dict[str, object], digest: str) -> str:
    values: dict[str, object] = {
        "id": model_id,
        "version": "1",
        "contract": CONTRACT_VERSION,
        "opset": OPSET,
        "sha256": digest,
        "variant": config["variant"],
        "training_data": "simulated: ICBM 152 tissue maps, random anatomy, lesions and acquisition (models/training)",
        "intended_use": RESEARCH_USE,
        "preset": preset,
        "steps": config["steps"],
        "seed": config["seed"],
        "gate_offset": config["gate_offset"],
        "halo_voxels": HALO[str(config["variant"])],
        "stride": STRIDE,
        "limits": list(LIMITS),
    }
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
