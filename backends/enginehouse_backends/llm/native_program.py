"""Turns a recorded model into a native program: fuses, types and places its values, and runs it.

Values are F (float) or A (what linears read: the program's dtype, or float where the kernels want it). Buffers
are shared by values that don't live at the same time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from enginehouse_backends.llm.kernels.library import UNIT_BYTES, Kind, NativeOperation, NativeStep, library
from enginehouse_backends.llm.layers import AttentionLayer, Embedding, Linear, LinearKernel, RmsNorm
from enginehouse_backends.llm.native_coded import NativeCodedLinear
from enginehouse_backends.llm.native_linear import (
    NATIVE_TYPES,
    PACKED_TYPES,
    NativeLinear,
    NativeMemory,
    packs_pairs,
)
from enginehouse_backends.llm.program import NotNative, Operation, Program, Symbol
from enginehouse_backends.llm.runner import FloatArray, IntArray

if TYPE_CHECKING:
    from enginehouse_backends.llm.models import DecoderModel

_ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu_tanh": 1, "gelu": 2}
_KINDS = ("embed", "rms_norm", "linear", "add", "select_rows", "scale", "softcap")
_READ_BYTES_PER_S = 25e9
_FLOPS = 100e9
"""Of one core of today's servers."""
_PADDING = 16
"""Elements between rows: widths are often powers of two, whose columns would all meet in one cache set."""


@dataclass(slots=True)
class _Value:
    """What a slot of the recorded program becomes."""

    width: int
    is_float: bool = True
    after_select: bool = False
    last_use: int = 0
    address: int = 0

    @property
    def stride(self) -> int:
        lanes = library().lanes
        return -(-self.width // lanes) * lanes + _PADDING


@dataclass(slots=True)
class _Buffers:
    """Memory for values; a buffer whose value is dead serves the next one that fits."""

    free: list[NativeMemory] = field(default_factory=list)
    all: list[NativeMemory] = field(default_factory=list)

    def take(self, num_bytes: int) -> NativeMemory:
        fitting = [memory for memory in self.free if num_bytes <= memory.num_bytes <= 2 * num_bytes]
        memory = min(fitting, key=lambda memory: memory.num_bytes, default=None)
        if memory is None:
            memory = NativeMemory(num_bytes)
            self.all.append(memory)
        else:
            self.free.remove(memory)
        return memory


class NativeProgram:
    """A model's step in native code. `max_tokens` rows at most, `max_wanted` of them with logits."""

    def __init__(self, model: DecoderModel, dtype: torch.dtype, max_tokens: int, max_wanted: int) -> None:
        """Raises NotNative if the model has a part that there is no operation for."""
        if dtype not in PACKED_TYPES:
            raise NotNative(f"{dtype}")
        self.max_tokens, self.max_wanted = max_tokens, max_wanted
        self._num_weights = {False: 0, True: 0}
        """Elements of linears, by whether they run for wanted rows only."""
        self._dtype = dtype
        self._parts: list[Any] = []
        """Tensors and packed weights that the operations point to."""
        self._native: list[NativeOperation] = []
        self._buffers = _Buffers()
        self._compile(model)
        self._handle = library().program(self._native, NATIVE_TYPES[dtype])

    def run(self, step: NativeStep, num_threads: int) -> None:
        library().program_run(self._handle, step, num_threads)

    def seconds_alone(self, num_tokens: int, num_wanted: int) -> float:
        """About how long one thread takes: whatever is slower, reading the weights or computing with them."""
        body, head = self._num_weights[False], self._num_weights[True]
        reading = (body + head) * self._dtype.itemsize / _READ_BYTES_PER_S
        return max(reading, 2 * (body * num_tokens + head * num_wanted) / _FLOPS)

    def close(self) -> None:
        if self._handle:
            library().program_free(self._handle)
        self._handle = 0
        self._buffers = _Buffers()
        self._parts.clear()

    @property
    def num_bytes(self) -> int:
        return sum(memory.num_bytes for memory in self._buffers.all)

    # --- compiling
    def _compile(self, model: DecoderModel) -> None:
        recorded = Program()
        logits = model.forward(recorded.input(1), None)
        assert isinstance(logits, Symbol), "bug: a recorded model gave no symbol"
        operations = _fuse(recorded.operations)
        self._values = _type_values(operations, recorded.widths)
        for index, operation in enumerate(operations):
            self._emit(operation, index)
            for slot in {*operation.inputs, operation.output}:
                if self._values[slot].last_use <= index and slot != logits.slot:
                    self._release(self._values[slot])
        self._finish(self._values[logits.slot])

    def _finish(self, logits: _Value) -> None:
        self.vocab_size = logits.width
        rows = self.max_wanted
        self.logits: FloatArray = _array(logits.address, (rows, logits.stride), np.float32)[:, : logits.width]
        memory = self._buffers.take(4 * rows)
        self.greedy: IntArray = _array(memory.address, (rows,), np.int32)
        self._add(
            Kind.ARGMAX, n=logits.width, input=logits.address, input_stride=logits.stride, output=memory.address,
            output_stride=1, wanted_rows=1,
        )  # fmt: skip

    def _add(self, kind: Kind, **fields: Any) -> None:
        self._native.append(NativeOperation(kind=kind, **fields))

    def _place(self, value: _Value) -> None:
        rows = self.max_wanted if value.after_select else self.max_tokens
        memory = self._buffers.take(4 * rows * value.stride)
        value.address = memory.address

    def _release(self, value: _Value) -> None:
        memory = next((m for m in self._buffers.all if m.address == value.address), None)
        if memory is not None and memory not in self._buffers.free:
            self._buffers.free.append(memory)

    def _pointer(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._parts.append(tensor)
        return tensor.data_ptr()

    def _emit(self, operation: Operation, index: int) -> None:
        out = self._values[operation.output]
        inputs = [self._values[slot] for slot in operation.inputs]
        self._place(out)
        fields: dict[str, Any] = {
            "n": out.width, "output": out.address, "output_stride": out.stride, "wanted_rows": out.after_select,
        }  # fmt: skip
        if operation.kind != "embed":
            fields |= {"input": inputs[0].address, "input_stride": inputs[0].stride}
        if len(inputs) > 1:
            fields |= {"second": inputs[1].address, "second_stride": inputs[1].stride}
        families = ("gated_linear", "gated")
        kind = next((family for family in families if operation.kind.startswith(f"{family}_")), operation.kind)
        getattr(self, f"_emit_{kind}")(operation, fields)

    def _emit_embed(self, operation: Operation, fields: dict[str, Any]) -> None:
        head, table = operation.parts["head"], operation.parts["weight"]
        fields |= {"number": operation.numbers["scale"]}
        if isinstance(head, NativeLinear):
            self._parts.append(head)
            self._add(Kind.EMBED, **fields, weight=head.packed.address, k=head.out_features, choice=1)
        elif isinstance(table, torch.Tensor) and table.dtype == self._dtype:
            self._add(Kind.EMBED, **fields, weight=self._pointer(table))
        else:
            raise NotNative("embedding")

    def _emit_rms_norm(self, operation: Operation, fields: dict[str, Any]) -> None:
        weight = self._pointer(operation.parts["weight"])
        is_float = self._values[operation.output].is_float
        self._add(Kind.NORM, **fields, weight=weight, epsilon=operation.numbers["epsilon"], choice=is_float)

    def _emit_add_norm(self, operation: Operation, fields: dict[str, Any]) -> None:
        total = self._values[int(operation.numbers["sum"])]
        self._place(total)
        fields |= {"sum": total.address, "sum_stride": total.stride}
        weight = self._pointer(operation.parts["weight"])
        is_float = self._values[operation.output].is_float
        self._add(Kind.ADD_NORM, **fields, weight=weight, epsilon=operation.numbers["epsilon"], choice=is_float)

    def _emit_linear(self, operation: Operation, fields: dict[str, Any]) -> None:
        kernel = operation.parts["kernel"]
        if isinstance(kernel, NativeCodedLinear):
            self._emit_coded(kernel, operation, fields)
            return
        if not isinstance(kernel, NativeLinear) or kernel.dtype != self._dtype:
            raise NotNative(f"linear of {type(kernel).__name__}")
        self._parts.append(kernel)
        source = self._values[operation.inputs[0]]
        if source.is_float and self._dtype != torch.float32 and not library().float_inputs:
            cast = _Value(source.width, is_float=False, after_select=source.after_select)
            self._place(cast)
            self._add(
                Kind.CAST, n=source.width, input=source.address, input_stride=source.stride, output=cast.address,
                output_stride=cast.stride, wanted_rows=cast.after_select,
            )  # fmt: skip
            fields |= {"input": cast.address, "input_stride": cast.stride}
            self._release(cast)
        self._num_weights[fields["wanted_rows"]] += kernel.out_features * kernel.in_features
        bias = self._pointer(kernel.bias)
        self._add(Kind.LINEAR, **fields, k=kernel.in_features, weight=kernel.packed.address, bias=bias)

    def _emit_gated_linear(self, operation: Operation, fields: dict[str, Any]) -> None:
        width = operation.parts["kernel"].out_features
        self._emit_linear(operation, {**fields, "n": width, "choice": 1 + _activation(operation)})

    def _emit_coded(self, kernel: NativeCodedLinear, operation: Operation, fields: dict[str, Any]) -> None:
        """The rows rounded to 8 bits, then multiplied with the codes."""
        self._parts.append(kernel)
        source = self._values[operation.inputs[0]]
        wanted = fields["wanted_rows"]
        rounded = _Value(kernel.num_units * UNIT_BYTES // 4, after_select=source.after_select)
        self._place(rounded)
        weight = ctypes.addressof(kernel.native)
        self._add(
            Kind.ROUND, n=kernel.in_features, input=source.address, input_stride=source.stride, weight=weight,
            output=rounded.address, output_stride=kernel.num_units, choice=source.is_float, wanted_rows=wanted,
        )  # fmt: skip
        self._num_weights[wanted] += kernel.num_bytes // self._dtype.itemsize
        fields |= {"input": rounded.address, "input_stride": kernel.num_units}
        self._add(Kind.CODED, **fields, k=kernel.in_features, weight=weight)
        self._release(rounded)

    def _emit_attention(self, operation: Operation, fields: dict[str, Any]) -> None:
        layer: AttentionLayer = operation.parts["layer"]
        _check_attention(layer)
        shape: dict[str, Any] = {
            "layer": layer.index, "heads": layer.num_heads, "kv_heads": layer.num_kv_heads, "dim": layer.head_dim,
            "window": layer.window, "number": layer.scale, "softcap": layer.softcap,
            "rotary_dim": 0 if layer.rope is None else layer.rope.shape[1], "rope": self._pointer(layer.rope),
            "q_norm": self._norm(layer.q_norm), "k_norm": self._norm(layer.k_norm),
            "epsilon": 0.0 if layer.q_norm is None else layer.q_norm.epsilon,
        }  # fmt: skip
        queries = _Value(layer.num_heads * layer.head_dim, is_float=False)
        self._place(queries)
        self._add(Kind.TURN, **{**fields, **shape, "output": queries.address})
        self._add(Kind.ATTEND, **{**fields, **shape, "input": queries.address})
        self._release(queries)

    def _norm(self, norm: RmsNorm | None) -> int | None:
        return None if norm is None else self._pointer(norm.weight)

    def _emit_gated(self, operation: Operation, fields: dict[str, Any]) -> None:
        self._add(Kind.GATED, **fields, choice=_activation(operation))

    def _emit_add(self, operation: Operation, fields: dict[str, Any]) -> None:
        self._add(Kind.ADD, **fields)

    def _emit_select_rows(self, operation: Operation, fields: dict[str, Any]) -> None:
        self._add(Kind.SELECT, **fields)

    def _emit_scale(self, operation: Operation, fields: dict[str, Any]) -> None:
        self._add(Kind.SCALE, **fields, number=operation.numbers["factor"])

    def _emit_softcap(self, operation: Operation, fields: dict[str, Any]) -> None:
        self._add(Kind.SOFTCAP, **fields, number=operation.numbers["cap"])


def check_native(model: DecoderModel, dtype: torch.dtype) -> None:
    """Whether a model whose weights are not loaded can become a program. Raises NotNative if not."""
    if dtype not in PACKED_TYPES:
        raise NotNative(f"{dtype}")
    nothing = torch.empty(0, dtype=dtype)
    for layer in model.walk():
        if isinstance(layer, Linear):
            layer.kernel = _Unpacked(layer)
        elif isinstance(layer, RmsNorm | Embedding):
            layer.weight = nothing
    recorded = Program()
    model.forward(recorded.input(1), None)
    for operation in recorded.operations:
        if operation.kind == "attention":
            _check_attention(operation.parts["layer"])
        elif operation.kind.startswith("gated_"):
            _activation(operation)
        elif operation.kind not in _KINDS:
            raise NotNative(f"operation '{operation.kind}'")
    _type_values(_fuse(recorded.operations), recorded.widths)


class _Unpacked(LinearKernel):
    """Stands for a linear's weights while a model is being checked."""

    def __init__(self, linear: Linear) -> None:
        if linear.spec.in_features % 2:
            raise NotNative("linear with an odd number of inputs")
        self.out_features = sum(part.out_features for part in linear.spec.parts)
        self.paired = packs_pairs(linear.spec.paired, self.out_features)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("bug: a model was run while it was being checked")

    def record(self, x: Symbol) -> Symbol:
        return x.program.add("linear", self.out_features, (x,), parts={"kernel": self})


def _activation_name(operation: Operation) -> str:
    return operation.kind.removeprefix("gated_").removeprefix("linear_")


def _activation(operation: Operation) -> int:
    kind = _activation_name(operation)
    if kind not in _ACTIVATIONS:
        raise NotNative(f"activation '{kind}'")
    return _ACTIVATIONS[kind]


def _check_attention(layer: AttentionLayer) -> None:
    lanes, most = library().lanes, library().max_dim
    if layer.head_dim % lanes or layer.head_dim > most:
        raise NotNative(f"heads of {layer.head_dim} (multiples of {lanes} up to {most} are native)")
    if layer.q_norm is not None and layer.k_norm is not None and layer.q_norm.epsilon != layer.k_norm.epsilon:
        raise NotNative("norms of q and k that differ")


def _fuse(operations: Sequence[Operation]) -> list[Operation]:
    """An add followed at once by the norm of its sum becomes one operation (`sum` names the sum's slot), and so do a
    linear that keeps pairs together and what multiplies them."""
    fused: list[Operation] = []
    for operation in operations:
        last = fused[-1] if fused else None
        if (
            last is not None
            and last.kind == "add"
            and operation.kind == "rms_norm"
            and operation.inputs == (last.output,)
        ):
            numbers = {**operation.numbers, "sum": float(last.output)}
            fused[-1] = replace(operation, kind="add_norm", inputs=last.inputs, numbers=numbers)
        elif last is not None and last.kind == "linear" and last.parts["kernel"].paired:
            assert operation.kind.startswith("gated_"), "bug: pairs that nothing multiplies"
            assert operation.inputs == (last.output,), "bug: pairs that nothing multiplies"
            kind = f"gated_linear_{_activation_name(operation)}"
            fused[-1] = replace(operation, kind=kind, inputs=last.inputs, parts=last.parts)
        else:
            fused.append(operation)
    return fused


def _type_values(operations: Sequence[Operation], widths: Sequence[int]) -> list[_Value]:
    """Which values are A, which belong to wanted rows only, and when each is used last."""
    values = [_Value(width) for width in widths]
    readers: dict[int, set[str]] = {}
    for index, operation in enumerate(operations):
        for slot in operation.inputs:
            is_linear = operation.kind.startswith("gated_linear_")
            readers.setdefault(slot, set()).add("linear" if is_linear else operation.kind)
            values[slot].last_use = index
    for operation in operations:
        out = values[operation.output]
        selected = any(values[slot].after_select for slot in operation.inputs)
        out.after_select = selected or operation.kind == "select_rows"
        only_linears = readers.get(operation.output, set()) == {"linear"}
        if operation.kind in ("rms_norm", "add_norm"):
            out.is_float = not only_linears
        elif operation.kind == "attention" or operation.kind.startswith("gated_"):
            if not only_linears:
                raise NotNative(f"{operation.kind} that is not followed by a linear")
            out.is_float = False
        if "sum" in operation.numbers:
            values[int(operation.numbers["sum"])].after_select = out.after_select
    return values


def _array(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).reshape(shape)
