"""The parts that decoders are made of. Model files only put them together.

Every layer knows its checkpoint names and its share of a tensor-parallel group, loads itself, and runs on
torch tensors, or records itself when called with a Symbol (see program.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F

from enginehouse_backends.llm.architecture import Architecture
from enginehouse_backends.llm.attention import StepBatch
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.parallel_group import ParallelGroup
from enginehouse_backends.llm.program import NotNative, Symbol
from enginehouse_backends.llm.rope import rope_table
from enginehouse_backends.llm.row_operations import RowOperations, TorchRows

Value: TypeAlias = torch.Tensor | Symbol


class Split(Enum):
    """How a linear is divided among ranks: not, by its outputs, or by its inputs (then summed)."""

    NONE = "none"
    OUTPUTS = "outputs"
    INPUTS = "inputs"


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor of a fused linear. `units` are what may be divided: heads, or columns if 0."""

    name: str
    """Without `.weight`."""
    out_features: int
    units: int = 0
    first_row: int = 0
    stored_rows: int = 0
    """Where a checkpoint tensor holds more than this part: its rows. 0 is `out_features`."""

    def cut(self, *sizes_and_units: tuple[int, int]) -> tuple[Part, ...]:
        """The parts that lie after each other in this one, for checkpoints that fuse them already."""
        parts, first = [], 0
        for size, units in sizes_and_units:
            parts.append(Part(self.name, size, units, first, self.out_features))
            first += size
        assert first == self.out_features, "bug: the cuts don't add up to the tensor"
        return tuple(parts)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part's rows of the stored tensor."""
        return tensor.narrow(0, self.first_row, self.out_features)

    @property
    def num_stored_rows(self) -> int:
        return self.stored_rows or self.out_features


@dataclass(frozen=True, slots=True)
class LinearSpec:
    parts: tuple[Part, ...]
    in_features: int
    bias: bool = False
    split: Split = Split.NONE
    paired: bool = False
    """Two parts of one size, whose outputs are needed in pairs: a kernel may keep those together."""

    @property
    def name(self) -> str:
        return self.parts[0].name


class LinearKernel(ABC):
    """A linear's weights in the place and layout from which they are used."""

    out_features: int
    num_bytes: int
    paired = False
    """The outputs of its two parts alternate by vectors: only a gated activation can follow."""

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] → [rows, out]"""

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """The weight's own rows, for an embedding that is tied to it."""
        raise NotImplementedError(type(self).__name__)

    def record(self, x: Symbol) -> Symbol:
        raise NotNative(type(self).__name__)


LoadLinear: TypeAlias = Callable[[LinearSpec, Checkpoint, "Build"], LinearKernel]


@dataclass(frozen=True, slots=True)
class Build:
    """What a model is built for. `load_linear` is where packing and quantization plug in."""

    architecture: Architecture
    load_linear: LoadLinear
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: ParallelGroup = field(default_factory=ParallelGroup)
    rows: RowOperations = field(default_factory=TorchRows)
    max_positions: int = 0
    """Longest context served: rotary tables reach so far. 0 is the architecture's."""
    on_loaded: Callable[[int], None] = lambda num_bytes: None
    """Called with the bytes of each checkpoint tensor that has found its place."""
    pooled: bool = False
    """The model gives its last layer's normed rows instead of logits: for embeddings."""
    share_tied: bool = False
    """Embeddings read a tied head's packed weights, and keep no copy of their own (native programs)."""


class Layer:
    """A node of the model. Children are found in attributes and lists of them."""

    def children(self) -> Iterator[Layer]:
        for value in vars(self).values():
            if isinstance(value, Layer):
                yield value
            elif isinstance(value, list):
                yield from (item for item in value if isinstance(item, Layer))

    def load(self, checkpoint: Checkpoint) -> None:
        for child in self.children():
            child.load(checkpoint)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each checkpoint tensor that this layer itself loads."""
        return iter(())

    def walk(self) -> Iterator[Layer]:
        yield self
        for child in self.children():
            yield from child.walk()


def read_share(checkpoint: Checkpoint, part: Part, spec: LinearSpec, build: Build) -> torch.Tensor:
    """This rank's share of a part's weight, still a view of the file."""
    weight = part.rows(checkpoint.tensor(f"{part.name}.weight", (part.num_stored_rows, spec.in_features)))
    if spec.split is Split.OUTPUTS:
        return weight.narrow(0, *output_range(part, build))
    if spec.split is Split.INPUTS:
        return weight.narrow(1, *build.group.share(spec.in_features))
    return weight


def read_bias_share(checkpoint: Checkpoint, part: Part, spec: LinearSpec, build: Build) -> torch.Tensor:
    bias = part.rows(checkpoint.tensor(f"{part.name}.bias", (part.num_stored_rows,)))
    if spec.split is Split.OUTPUTS:
        return bias.narrow(0, *output_range(part, build))
    # summed over ranks: only the first adds it
    return bias if spec.split is Split.NONE or build.group.rank == 0 else torch.zeros_like(bias)


def output_range(part: Part, build: Build) -> tuple[int, int]:
    """First row and number of rows of this rank's share of a part that is split by its outputs."""
    units = part.units or part.out_features
    first, count = build.group.share(units)
    size = part.out_features // units
    return first * size, count * size


class Linear(Layer):
    """One or several checkpoint linears with the same input, fused by joining their outputs."""

    kernel: LinearKernel

    def __init__(
        self,
        build: Build,
        parts: Sequence[Part],
        in_features: int,
        bias: bool = False,
        split: Split = Split.NONE,
        paired: bool = False,
    ) -> None:
        self._build = build
        self.spec = LinearSpec(tuple(parts), in_features, bias, split, paired)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in self.spec.parts:
            yield f"{part.name}.weight", (part.num_stored_rows, self.spec.in_features)
            if self.spec.bias:
                yield f"{part.name}.bias", (part.num_stored_rows,)

    def load(self, checkpoint: Checkpoint) -> None:
        self.kernel = self._build.load_linear(self.spec, checkpoint, self._build)

    def __call__(self, x: Value) -> Value:
        if isinstance(x, Symbol):
            if self._build.group.world_size > 1:
                raise NotNative("tensor parallel")
            return self.kernel.record(x)
        out = self.kernel(x)
        return self._build.group.all_reduce(out) if self.spec.split is Split.INPUTS else out


class RmsNorm(Layer):
    """x / rms(x) * (weight + offset). With a residual: adds it first and gives the sum too."""

    weight: torch.Tensor

    def __init__(self, build: Build, name: str, width: int, offset: float = 0.0) -> None:
        self._build, self.name, self.width, self.offset = build, name, width, offset
        self.epsilon = build.architecture.norm_epsilon

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{self.name}.weight", (self.width,)

    def load(self, checkpoint: Checkpoint) -> None:
        stored = checkpoint.tensor(f"{self.name}.weight", (self.width,))
        # float32 throughout: it is small, and the sum of squares is kept in float32 anyway
        self.weight = stored.to(self._build.device, torch.float32, copy=True) + self.offset
        self._build.on_loaded(stored.nbytes)

    def __call__(self, x: Value) -> Value:
        if isinstance(x, Symbol):
            return x.program.add("rms_norm", self.width, (x,), {"epsilon": self.epsilon}, {"weight": self.weight})
        return self._build.rows.rms_norm(x, self.weight, self.epsilon)

    def add(self, x: Value, residual: Value) -> tuple[Value, Value]:
        """(norm of the sum, the sum). `residual` is used up."""
        if isinstance(x, torch.Tensor) and isinstance(residual, torch.Tensor):
            return self._build.rows.add_rms_norm(x, residual, self.weight, self.epsilon)
        total = add(x, residual)
        return self(total), total


class Embedding(Layer):
    """Token ids to rows. `scale` multiplies them (Gemma)."""

    weight: torch.Tensor | None = None
    tied_head: Linear | None = None
    """Set by a tied head whose packed weights are the only copy."""

    def __init__(self, build: Build, name: str, scale: float = 1.0) -> None:
        self._build, self.name, self.scale = build, name, scale
        self.vocab_size, self.width = build.architecture.vocab_size, build.architecture.hidden_size

    def children(self) -> Iterator[Layer]:
        return iter(())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{self.name}.weight", (self.vocab_size, self.width)

    def load(self, checkpoint: Checkpoint) -> None:
        if self.tied_head is not None:
            return
        stored = checkpoint.tensor(f"{self.name}.weight", (self.vocab_size, self.width))
        self.weight = stored.to(self._build.device, self._build.dtype, copy=True)
        self._build.on_loaded(stored.nbytes)
        del stored
        checkpoint.release(f"{self.name}.weight")

    def __call__(self, tokens: Value) -> Value:
        if isinstance(tokens, Symbol):
            head = None if self.tied_head is None else self.tied_head.kernel
            parts = {"weight": self.weight, "head": head}
            return tokens.program.add("embed", self.width, (tokens,), {"scale": self.scale}, parts)
        if self.tied_head is not None:
            rows = self.tied_head.kernel.rows(tokens)
        else:
            assert self.weight is not None, "bug: an embedding is asked before it is loaded"
            rows = F.embedding(tokens, self.weight)
        return rows if self.scale == 1.0 else rows * self.scale


class Head(Layer):
    """The rows whose logits are wanted to [rows, vocab] float32. `softcap` c gives c * tanh(x / c)."""

    def __init__(self, build: Build, name: str, embedding: Embedding | None, softcap: float = 0.0) -> None:
        """`embedding` is the one whose weights it shares; None if it has its own under `name`."""
        self._build, self._embedding, self.softcap = build, embedding, softcap
        architecture = build.architecture
        part = Part(name if embedding is None else embedding.name, architecture.vocab_size)
        # a share of the vocabulary each, where it can be divided
        self._is_divided = build.group.world_size > 1 and architecture.vocab_size % build.group.world_size == 0
        split = Split.OUTPUTS if self._is_divided else Split.NONE
        self.linear = Linear(build, (part,), architecture.hidden_size, split=split)
        if embedding is not None and build.share_tied:
            embedding.tied_head = self.linear

    def children(self) -> Iterator[Layer]:
        yield self.linear

    def __call__(self, x: Value) -> Value:
        logits = self.linear(x)
        if isinstance(logits, Symbol):
            if self.softcap:
                return logits.program.add("softcap", logits.width, (logits,), {"cap": self.softcap})
            return logits
        logits = self._build.group.all_gather(logits) if self._is_divided else logits
        logits = logits.float()
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


class NoHead(Layer):
    """The wanted rows as they are, float32: of a model that embeds."""

    def __call__(self, x: Value) -> Value:
        if isinstance(x, Symbol):
            raise NotNative("pooling")
        return x.float()


def make_head(build: Build, name: str, embedding: Embedding | None, softcap: float = 0.0) -> Head | NoHead:
    """As Head's own arguments."""
    return NoHead() if build.pooled else Head(build, name, embedding, softcap)


class GatedActivation(Layer):
    """[rows, 2 n] → [rows, n]: activation of the first half times the second half."""

    def __init__(self, build: Build, kind: str) -> None:
        self._build, self.kind = build, kind

    def __call__(self, x: Value) -> Value:
        if isinstance(x, Symbol):
            return x.program.add(f"gated_{self.kind}", x.width // 2, (x,))
        return self._build.rows.gate(x, self.kind)


class AttentionLayer(Layer):
    """Everything about one layer's attention but its linears. Heads are this rank's."""

    def __init__(
        self,
        build: Build,
        index: int,
        rope: torch.Tensor | None,
        q_norm: RmsNorm | None = None,
        k_norm: RmsNorm | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> None:
        architecture = build.architecture
        self.index = index
        self.num_heads = build.group.share(architecture.num_heads)[1]
        self.num_kv_heads = build.group.share(architecture.num_kv_heads)[1]
        self.head_dim = architecture.head_dim
        self.scale = architecture.head_dim**-0.5 if scale is None else scale
        self.window = architecture.sliding_windows[index]
        self.softcap = softcap
        self.rope = rope
        """[positions, rotary_dim] float32, cosines then sines; None leaves positions out."""
        self.q_norm, self.k_norm = q_norm, k_norm

    def __call__(self, qkv: Value, step: StepBatch | None) -> Value:
        """`step` is None only while recording."""
        if isinstance(qkv, Symbol):
            return qkv.program.add("attention", self.num_heads * self.head_dim, (qkv,), parts={"layer": self})
        assert step is not None, "bug: attention on tensors needs a step"
        return step.attention.attend(self, qkv, step)


def add(x: Value, y: Value) -> Value:
    """x + y; both are tensors or both symbols."""
    return cast("Value", x + y)  # type: ignore[operator]


def make_rope(build: Build) -> torch.Tensor:
    """The rotary table of the architecture, for all its layers."""
    architecture = build.architecture
    return rope_table(architecture.rope, build.max_positions or architecture.max_positions).to(build.device)


def select_rows(x: Value, step: StepBatch | None) -> Value:
    """Only the rows whose logits are wanted."""
    if isinstance(x, Symbol):
        return x.program.add("select_rows", x.width, (x,))
    assert step is not None, "bug: rows of tensors need a step"
    return x[step.wanted_rows]
