"""What is measured: the models, their repositories for either server, and one request to each.

identity runs in `model.py` on both servers. MiniLM (real weights) and ResNet-18 (its size, random weights) run in ONNX
Runtime with one thread: natively here, inside a `model.py` there, because the pip package of Triton carries
only its python backend.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS = 32
_RANDOM = np.random.default_rng(7)


@dataclass(frozen=True, slots=True)
class Workload:
    """One model and the request that is sent to it again and again (a batch of one)."""

    name: str
    max_batch_size: int
    inputs: Mapping[str, Array]
    output: str
    output_shape: tuple[int, ...]
    is_onnx: bool = True

    def batch(self, size: int) -> dict[str, Array]:
        return {name: np.repeat(array, size, axis=0) for name, array in self.inputs.items()}


WORKLOADS = {
    each.name: each
    for each in (
        Workload(
            "identity",
            64,
            {"INPUT0": _RANDOM.random((1, 16), dtype=np.float32)},
            "OUTPUT0",
            (1, 16),
            is_onnx=False,
        ),
        Workload(
            "minilm",
            16,
            {
                "input_ids": _RANDOM.integers(1000, 20000, (1, NUM_TOKENS)),
                "attention_mask": np.ones((1, NUM_TOKENS), np.int64),
            },
            "last_hidden_state",
            (1, NUM_TOKENS, 384),
        ),
        Workload(
            "resnet18",
            8,
            {"image": _RANDOM.random((1, 3, 224, 224), dtype=np.float32)},
            "logits",
            (1, 1000),
        ),
    )
}


def make_repositories(folder: Path, workloads: Iterable[Workload], delay_us: int) -> tuple[Path, Path]:
    """(ours, Triton's) of these models alone. The artifacts are shared; ONNX files are made once."""
    artifacts, ours, tritons = folder / "artifacts", folder / "ours", folder / "triton"
    artifacts.mkdir(parents=True, exist_ok=True)
    for repository in (ours, tritons):
        shutil.rmtree(repository, ignore_errors=True)
    for work in workloads:
        if work.name == "minilm":
            _minilm(artifacts / "minilm.onnx")
        elif work.name == "resnet18" and not (artifacts / "resnet18.onnx").exists():
            onnx.save(resnet18(), artifacts / "resnet18.onnx")
        _write_ours(ours / work.name, work, artifacts, delay_us)
        _write_tritons(tritons / work.name, work, artifacts, delay_us)
    return ours, tritons


def _minilm(path: Path) -> None:
    built = ROOT / "model_repository" / "minilm" / "1" / "model.onnx"
    if not built.exists():
        raise SystemExit("the example models are not built yet: make examples")
    if not path.exists() or path.stat().st_mtime < built.stat().st_mtime:
        # one file, wherever the weights were
        onnx.save(onnx.load(built), path)


def _write_ours(folder: Path, work: Workload, artifacts: Path, delay_us: int) -> None:
    version = folder / "1"
    version.mkdir(parents=True, exist_ok=True)
    if not work.is_onnx:
        shutil.copy(ROOT / "model_repository" / "identity" / "1" / "model.py", version / "model.py")
        (folder / "config.pbtxt").write_text(_config(work, "python", delay_us))
        return
    target = version / "model.onnx"
    target.unlink(missing_ok=True)
    target.symlink_to(artifacts / f"{work.name}.onnx")
    # as in the bare loop and in Triton's model.py, whose sessions keep their memory in an arena
    settings = {"intra_op_thread_count": 1, "enable_mem_arena": 1}
    texts = (f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n' for key, value in settings.items())
    (folder / "config.pbtxt").write_text(_config(work, "onnxruntime", delay_us, "".join(texts)))


def _write_tritons(folder: Path, work: Workload, artifacts: Path, delay_us: int) -> None:
    version = folder / "1"
    version.mkdir(parents=True, exist_ok=True)
    if work.is_onnx:
        names = ", ".join(repr(name) for name in work.inputs)
        text = _ONNX_MODEL.format(path=str(artifacts / f"{work.name}.onnx"), inputs=names, output=work.output)
        (version / "model.py").write_text(text)
    else:
        shutil.copy(ROOT / "model_repository" / "identity" / "1" / "model.py", version / "model.py")
    (folder / "config.pbtxt").write_text(_config(work, "python", delay_us))


_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


def _config(work: Workload, backend: str, delay_us: int, more: str = "") -> str:
    inputs = ", ".join(
        f'{{ name: "{name}" data_type: {_TYPES[array.dtype.name]} dims: {list(array.shape[1:])} }}'
        for name, array in work.inputs.items()
    )
    delay = f"max_queue_delay_microseconds: {delay_us}" if work.is_onnx and delay_us else ""
    return (
        f'name: "{work.name}"\nbackend: "{backend}"\nmax_batch_size: {work.max_batch_size}\n'
        f"input [ {inputs} ]\n"
        f'output [ {{ name: "{work.output}" data_type: TYPE_FP32 dims: {list(work.output_shape[1:])} }} ]\n'
        f"dynamic_batching {{ {delay} }}\ninstance_group [ {{ count: 1 kind: KIND_CPU }} ]\n{more}"
    )


_ONNX_MODEL = '''"""Runs the whole dynamic batch in ONNX Runtime with the settings of the other server."""
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession({path!r}, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        feed, sizes = {{}}, []
        for name in ({inputs},):
            parts = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            sizes = [len(part) for part in parts]
            feed[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        output = self.session.run(["{output}"], feed)[0]
        responses, start = [], 0
        for size in sizes:
            part = output[start : start + size]
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("{output}", part)]))
            start += size
        return responses
'''


def session(path: Path) -> Any:
    """An ONNX Runtime session with the settings of all that is measured here."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class _Network:
    """ONNX nodes and weights as they are added; each call gives the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._random = np.random.default_rng(18)

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def weight(self, *shape: int) -> str:
        scale = np.sqrt(2 / max(1, int(np.prod(shape[1:]))))
        values = (self._random.standard_normal(shape) * scale).astype(np.float32)
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values if len(shape) > 1 else values * 0, name))
        return name

    def conv(self, source: str, channels: tuple[int, int], size: int, stride: int) -> str:
        """Batch normalisation is folded in, as exporters do."""
        into, out = channels
        pads = [size // 2] * 4
        weights = (self.weight(out, into, size, size), self.weight(out))
        return self.add("Conv", source, *weights, kernel_shape=[size, size], strides=[stride, stride], pads=pads)

    def block(self, source: str, into: int, out: int, stride: int) -> str:
        inner = self.add("Relu", self.conv(source, (into, out), 3, stride))
        inner = self.conv(inner, (out, out), 3, 1)
        beside = source if into == out else self.conv(source, (into, out), 1, stride)
        return self.add("Relu", self.add("Add", inner, beside))


def resnet18() -> Any:
    """The network of He et al. (2015) with random weights: 11.7 million parameters, 1.8 G multiply-adds."""
    net = _Network()
    x = net.add("Relu", net.conv("image", (3, 64), 7, 2))
    x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    into = 64
    for out in (64, 128, 256, 512):
        x = net.block(x, into, out, 1 if out == 64 else 2)
        x = net.block(x, out, out, 1)
        into = out
    x = net.add("Flatten", net.add("GlobalAveragePool", x), axis=1)
    net.nodes.append(helper.make_node("Gemm", [x, net.weight(1000, 512), net.weight(1000)], ["logits"], transB=1))
    graph = helper.make_graph(
        net.nodes,
        "resnet18",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000])],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
