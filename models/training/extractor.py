"""Convert the published brain extractor deepbet to the model folder that `models.extractor` runs.

Hides where its two networks lie (a wheel or an unpacked one), the export by torch, and two rewrites of the graph that
change no result: the softmax over (background, brain) becomes the sigmoid of their difference, and the weights are
stored in half precision and computed with in single. Copies the notice of the licence. Must never write a card for a
network that differs from its TorchScript by more than `TOLERANCE`, nor for a version that nobody looked at.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.volume import Array

SOURCE = "deepbet"
VERSION = "1.0.2"
OPSET = 17
NETWORKS = {"coarse": "bbox_model", "fine": "model"}  # our name: its name in the wheel
NOTICE = f"{SOURCE}-{VERSION}.dist-info/LICENSE"
TOLERANCE = 0.05  # largest difference of a probability, anywhere: half-precision weights measured .00 to .01
_SIDES = {2: "i", 3: "j", 4: "k"}


class ConversionError(ValueError):
    """The source is not the release that is known, or the converted network does not agree with it."""


@dataclass(frozen=True)
class Converted:
    """What was written, for people: the largest difference of each network from its TorchScript."""

    parity: dict[str, float]


def convert(source: Path, folder: Path) -> Converted:
    """Write coarse.onnx, fine.onnx, LICENSE and card.toml.

    Args:
        source: the wheel of deepbet, or a folder into which it was unpacked.
        folder: created; existing files are replaced.

    Raises:
        ConversionError: `source` lacks a file of the known release, or a network disagrees with its TorchScript.
    """
    notice = _read(source, NOTICE)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.toml").unlink(missing_ok=True)  # no card, no model: a failure leaves nothing that loads
    parity, files, origin = {}, {}, {}
    for name, original in NETWORKS.items():
        scripted = _read(source, f"data/models/{original}.pt")
        network = torch.jit.load(io.BytesIO(scripted), map_location="cpu").eval()
        path = folder / f"{name}.onnx"
        _write(network, path)
        parity[name] = _parity(network, path)
        if not parity[name] <= TOLERANCE:  # nor where it is not a number
            raise ConversionError(f"{name}: probabilities differ by {parity[name]:.2e} (at most {TOLERANCE:g})")
        files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        origin[f"{original}.pt"] = hashlib.sha256(scripted).hexdigest()
    (folder / "LICENSE").write_bytes(notice)
    (folder / "card.toml").write_text(_card(files, origin, parity), encoding="utf-8")
    return Converted(parity)


def _read(source: Path, name: str) -> bytes:
    try:
        if source.is_dir():
            return (source / name).read_bytes()
        with zipfile.ZipFile(source) as wheel:
            return wheel.read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ConversionError(f"{source.name} does not hold {name} of {SOURCE} {VERSION}") from error


def _write(network: Any, path: Path) -> None:
    import onnx  # noqa: PLC0415  conversion alone needs it

    example = torch.rand(1, 1, 64, 64, 64)
    with warnings.catch_warnings():  # torch is pinned; its newer exporter takes no TorchScript
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example,),
            str(path),
            input_names=["image"],
            output_names=["probability"],
            dynamic_axes={"image": _SIDES, "probability": _SIDES},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(path)
    _one_probability(model.graph)
    _store_in_half(model.graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _one_probability(graph: Any) -> None:
    """Softmax over two classes is the sigmoid of their difference, which the last, linear layer can give itself."""
    from onnx import helper, numpy_helper  # noqa: PLC0415

    last, softmax = graph.node[-2:]
    if (last.op_type, softmax.op_type) != ("ConvTranspose", "Softmax"):
        raise ConversionError("the network does not end in a transposed convolution and a softmax")
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for name, axis in zip(last.input[1:], (1, 0), strict=True):  # weight (in, out, ...), bias (out)
        background, brain = np.split(numpy_helper.to_array(weights[name]), 2, axis=axis)
        weights[name].CopyFrom(numpy_helper.from_array(brain - background, name))
    graph.node.remove(softmax)
    graph.node.append(helper.make_node("Sigmoid", [last.output[0]], [softmax.output[0]], name="probability"))
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1


def _store_in_half(graph: Any) -> None:
    """Every large weight in fp16, cast to fp32 where it is used; ONNX Runtime does so once, when it loads."""
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    casts = []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.size < 64 or values.dtype != np.float32:
            continue
        stored = f"{tensor.name}_half"
        casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
    nodes = [*casts, *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _parity(network: Any, path: Path) -> float:
    """Largest difference between torch and ONNX Runtime on a bright ball in noise, scaled as a head is."""
    import onnxruntime  # noqa: PLC0415

    image = _ball()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    there = session.run(["probability"], {"image": image})[0][0, 0]
    with torch.no_grad():
        here = network(torch.from_numpy(image))[0, 1].numpy()
    return float(np.abs(here - there).max())


def _ball() -> Array:
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1, 1, 96)] * 3, indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    image = np.clip(4 * (0.8 - radius), 0, 1) * (0.7 + 0.3 * np.sin(9 * radius)) + 0.03 * rng.standard_normal((96,) * 3)
    standard = (image - image.mean()) / image.std()
    return (0.226 * standard + 0.449).astype(np.float32)[None, None]


def _card(files: dict[str, str], origin: dict[str, str], parity: dict[str, float]) -> str:
    values = {
        "id": f"{SOURCE}-{VERSION}",
        "version": VERSION,
        "source": "deepbet by L. Fisch et al., University of Muenster; its release on PyPI",
        "citation": "Fisch et al., Computers in Biology and Medicine 179, 108845 (2024)",
        "licence": "MIT, see LICENSE beside this card",
        "training_data": "T1-weighted heads of healthy adults, by its authors; not trained by this project",
        "conversion": f"lowgad convert, opset {OPSET}: weights in fp16, softmax of two classes as sigmoid",
        "intended_use": "research use, not a medical device: where the brain lies in a T1-weighted head",
        "limits": [
            (
                "its authors state T1-weighted images of healthy adults; children and disease were tried by this "
                "project on few heads: see deploy/decisions/0024-brain-extraction.md"
            ),
            "it finds something brain-like in much that is none: models.brain judges what it gives",
        ],
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    for table, rows in (("sha256", files), ("origin_sha256", origin), ("parity", parity)):
        lines += ["", f"[{table}]"]
        lines += [f"{json.dumps(name)} = {json.dumps(_two_digits(v))}" for name, v in rows.items()]
    return "\n".join(lines) + "\n"


def _two_digits(value: str | float) -> str | float:
    return value if isinstance(value, str) else float(f"{value:.1e}")
