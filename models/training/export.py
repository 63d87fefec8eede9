"""Export: a checkpoint becomes a model folder that proves itself against torch: model.onnx, card.toml, model-fp16.onnx.

Hides how the half-precision network is made: weights and activations from the first to the last learned convolution
over the image are fp16; inputs, outputs, embedding, amplification and bound stay fp32, so that the bound holds exactly.
Must never write a card for a network that differs from the checkpoint, on a volume of another size than the one it was
traced with, by more than `TOLERANCE`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.card import RESEARCH_USE
from models.condition import CONTRACT_VERSION, NAMES
from models.training import checkpoint
from models.training.network import STRICT_FROM, STRIDE, VARIANTS, Network
from models.training.train import PRESETS
from models.volume import Array

OPSET = 18
HALO = {"small": 60, "base": 64}  # what a voxel depends on, in multiples of the stride; a test measures it
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3}  # largest difference from torch in fp32; white matter = 1
SIMULATED = (
    "simulated: ICBM 152 tissue maps, random anatomy, lesions and acquisition, dose response by the signal equations "
    "(models/training)"
)
UNPROVEN = "no clinical validation: trained on simulated studies"
UNPROVEN_SITE = "no clinical validation: trained on one site's own studies, not tested on any other site's"
LIMITS = (
    "lesions below 3 mm are often missed or blurred at doses of a third and less",
    "weak enhancement, also of a large lesion, can be missing at a third of the dose and less",
    "below a third of the dose more is missed and more enhances falsely: the tables say how much",
    "negative enhancement (T2* shortening; tissue before its null after an inversion) is not predicted",
    "trained from 1.4 to 3.2 T on SPGR, MPRAGE and spin echo; turbo spin echo counts as spin echo",
    (
        "the time from injection to scan is not told; "
        "pulsation, ghosts and signal voids at air and metal are not simulated"
    ),
    "all simulated heads are variations of one template",
)


class ParityError(ValueError):
    """The exported network does not agree with the checkpoint."""


def load_network(path: Path) -> tuple[Network, dict[str, object]]:
    """The averaged network of a checkpoint at its run's operating point, to evaluate, and the configuration of the run.

    Raises:
        ValueError: its weights are of another architecture.
    """
    saved = checkpoint.read(path)
    config = {**saved["config"], "steps": saved["step"]}
    network = Network(VARIANTS[str(config["variant"])], conditioned=bool(config.get("conditioned", True)))
    network.take(saved["average"])
    network.gate_offset = float(config.get("loss_offset", 0.0))
    network.state_dict()["embed.0.weight"].mul_(network.kept)  # what is never told has no weight
    return network.eval(), config


@dataclass(frozen=True)
class _Written:
    """A network on disk."""

    sha256: str
    parity: float  # largest difference from torch in fp32


def export(
    trained: Path,
    folder: Path,
    *,
    model_id: str,
    gate_offset: float | None = None,
    half: bool = False,
) -> float:
    """Write a model folder.

    Args:
        trained: checkpoint of `models.training.train`.
        folder: created; existing files are replaced.
        model_id: name of the model.
        gate_offset: the operating point: what is taken from the logit of the gate, in full from STRICT_FROM of the
            standard dose on and in proportion below, so that fewer voxels falsely enhance and more are missed. To be
            chosen on validation studies; that of training where None.
        half: write model-fp16.onnx, too.

    Returns:
        The largest difference between torch and model.onnx under ONNX Runtime; the card holds that of each network.

    Raises:
        ParityError: a difference exceeds its tolerance.
        ValueError: the offset is negative, or the checkpoint is of another architecture.
    """
    network, config = load_network(trained)
    if gate_offset is not None:
        network.gate_offset = gate_offset
    if network.gate_offset < 0:
        raise ValueError(f"a gate offset of {gate_offset:g} is negative: the gate would show what it takes for noise")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.toml").unlink(missing_ok=True)  # no card, no model: a failure leaves nothing that loads
    model = _traced(network, folder / "model.onnx")
    written = {"fp32": _write(model, folder / "model.onnx", network, "fp32")}
    if half:
        written["fp16"] = _write(halved(model), folder / "model-fp16.onnx", network, "fp16")
    else:
        (folder / "model-fp16.onnx").unlink(missing_ok=True)
    text = _card(model_id, config, written, network.gate_offset)
    (folder / "card.toml").write_text(text, encoding="utf-8")
    return written["fp32"].parity


def _traced(network: Network, path: Path) -> Any:
    """The network as an ONNX model; opset and contract are in it, where loading can compare them with the card."""
    import onnx  # noqa: PLC0415  export alone needs it

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
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"opset": str(OPSET), "contract": str(CONTRACT_VERSION)})
    return model


def _write(model: Any, path: Path, network: Network, precision: str) -> _Written:
    import onnx  # noqa: PLC0415

    onnx.save(model, path)
    difference = parity(network, path)
    if not difference <= TOLERANCE[precision]:  # nor where it is not a number
        raise ParityError(
            f"torch and the {precision} network differ by {difference:.2e} (at most {TOLERANCE[precision]:g})"
        )
    return _Written(hashlib.sha256(path.read_bytes()).hexdigest(), difference)


def halved(model: Any) -> Any:
    """A copy of an exported fp32 model whose body runs in fp16, with casts where tensors enter and leave it."""
    import onnx  # noqa: PLC0415
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph, inside = model.graph, _body(model.graph)
    weights = {weight.name: weight for weight in graph.initializer}
    counts = {
        node.output[0]
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].t.data_type != TensorProto.FLOAT
    }  # axes of a sum: no numbers to halve
    named: dict[str, str] = {}  # fp32 tensor to its fp16 counterpart
    nodes: list[Any] = []
    for node in graph.node:
        for place, name in enumerate(node.input if node.name in inside else ()):
            if name in counts:
                continue
            if name not in named:
                named[name] = f"{name}_half"
                if name in weights:
                    with np.errstate(over="ignore"):  # what does not fit becomes infinite and fails parity
                        values = numpy_helper.to_array(weights[name]).astype(np.float16)
                    graph.initializer.append(numpy_helper.from_array(values, named[name]))
                else:
                    nodes.append(helper.make_node("Cast", [name], [named[name]], to=TensorProto.FLOAT16))
            node.input[place] = named[name]
        nodes.append(node)
        if node.name in inside:
            (out,) = node.output
            named[out] = node.output[0] = f"{out}_half"
        if node.name == _LAST:
            nodes.append(helper.make_node("Cast", [named[out]], [out], to=TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input}
    kept = [weight for weight in graph.initializer if weight.name in used]
    for field in ("node", "initializer", "value_info"):
        graph.ClearField(field)
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    return model


_FIRST, _LAST = "/stem/Conv", "/head/Conv"


def _body(graph: Any) -> set[str]:
    """Names of the nodes that lie on a path from the stem to the head; nodes are in the order of execution."""
    node = {one.name: one for one in graph.node}
    reached, after = set(node[_FIRST].output), {_FIRST}
    for one in graph.node:
        if reached.intersection(one.input):
            reached.update(one.output)
            after.add(one.name)
    needed, before = set(node[_LAST].input), {_LAST}
    for one in reversed(graph.node):
        if needed.intersection(one.output):
            needed.update(one.input)
            before.add(one.name)
    return after & before


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


def _card(model_id: str, config: dict[str, object], written: dict[str, _Written], gate_offset: float) -> str:
    data = str(config.get("data", "simulated"))
    own = "site:" in data  # also where a stage on simulated studies followed
    values: dict[str, object] = {
        "id": model_id,
        "version": "1",
        "contract": CONTRACT_VERSION,
        "opset": OPSET,
        "sha256": written["fp32"].sha256,
        "parity": _two_digits(written["fp32"].parity),
        "variant": config["variant"],
        "training_data": data.replace("simulated", SIMULATED, 1),
        "intended_use": RESEARCH_USE.replace("simulated", "a site's own and simulated") if own else RESEARCH_USE,
        "preset": _preset(config),
        "steps": config["steps"],
        "seed": config["seed"],
        "gate_offset": gate_offset,
        "gate_strict_from": STRICT_FROM if config.get("conditioned", True) else 0.0,  # else it knows no dose
        "halo_voxels": HALO[str(config["variant"])],
        "stride": STRIDE,
        "limits": [*LIMITS, UNPROVEN_SITE if own else UNPROVEN],
    }
    if "fp16" in written:
        values |= {"sha256_fp16": written["fp16"].sha256, "parity_fp16": _two_digits(written["fp16"].parity)}
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def _preset(config: dict[str, object]) -> str:
    """The preset that a run was set up from, and where it differs from it, but for what the card tells elsewhere."""
    name = str(config.get("preset", "not recorded") or "own")
    if name not in PRESETS:
        return name
    usual = asdict(PRESETS[name])
    elsewhere = {"preset", "steps", "seed", "data", "start", "conditioned", "target"}
    other = [
        f"{field} {config[field]}"
        for field in usual
        if field not in elsewhere and config.get(field, usual[field]) != usual[field]
    ]
    return f"{name} with {', '.join(other)}" if other else name


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
