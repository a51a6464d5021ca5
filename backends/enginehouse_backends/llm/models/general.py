"""Any other decoder of transformers, its own modules running over our paged attention.

The attention of a model that follows transformers' AttentionInterface is replaced; everything else (norms,
rotation, MLPs) is the library's code, run on one flat row of all sequences' tokens. Slower than a family's own
file, and only as general as that interface: docs/llm-models.md lists what was tried.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from enginehouse.errors import EnginehouseError, Unsupported
from enginehouse_backends.llm.attention import KvShape, StepBatch
from enginehouse_backends.llm.attention.gather import GatherAttention
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.layers import AttentionLayer, Build, Layer, Value
from enginehouse_backends.llm.models import DecoderModel
from enginehouse_backends.llm.program import NotNative, Symbol

_ATTENTION = "enginehouse_paged"
_NOT_OURS = ("s_aux", "position_bias", "alibi", "block_mask")
"""Arguments by which a model asks its attention for something that paged attention doesn't do."""

_REHEARSED = 12
_ROUNDING = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Of the largest logit: what two orders of summation may differ by after all layers."""


@dataclass(slots=True)
class _Current:
    """What the attention modules share: the step that runs now, and which layers it has been through."""

    step: StepBatch | None
    seen: list[int]


class GeneralModel(DecoderModel):
    """See module."""

    model: Any
    is_capturable = False  # nobody knows what the library's modules do on the host

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        if build.group.world_size > 1:
            raise Unsupported(f"{build.architecture.family} can't be divided among GPUs: it has no file of its own")
        self._current = _Current(None, [])

    def children(self) -> Iterator[Layer]:
        return iter(())

    def load(self, checkpoint: Checkpoint) -> None:
        try:
            self.model = self._load(checkpoint)
            for module in self.model.modules():
                module.enginehouse_current = self._current
            self._selects_rows = "logits_to_keep" in inspect.signature(self.model.forward).parameters
            self._rehearse()
        except EnginehouseError:
            raise
        except Exception as error:
            raise Unsupported(
                f"{self.build.architecture.family} doesn't run over paged attention: {error!r}"
            ) from error
        self.build.on_loaded(checkpoint.num_bytes())

    def forward(self, tokens: Value, step: StepBatch | None) -> Value:
        if isinstance(tokens, Symbol):
            raise NotNative("transformers' own modules")
        assert step is not None, "bug: a model on tensors needs a step"
        self._current.step, self._current.seen = step, []
        arguments: dict[str, Any] = {"position_ids": step.positions[None].long(), "use_cache": False}
        if self._selects_rows:
            arguments["logits_to_keep"] = step.wanted_rows
        try:
            logits = self.model(input_ids=tokens[None].long(), **arguments).logits[0]
        finally:
            self._current.step = None
        return cast("torch.Tensor", logits if self._selects_rows else logits[step.wanted_rows]).float()

    def _load(self, checkpoint: Checkpoint) -> Any:
        import transformers
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, _no_mask)
        auto: Any = transformers.AutoModelForCausalLM
        loaded = auto.from_pretrained(checkpoint.folder, dtype=self.build.dtype, attn_implementation="eager")
        return loaded.to(self.build.device).eval()

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Compares a few tokens with the library's own attention, in one go and in two.

        Whatever doesn't fit (a recurrent state, both directions, a position of its own) is refused while
        loading instead of giving wrong tokens.
        """
        architecture, device = self.build.architecture, self.build.device
        ids = torch.arange(3, 3 + _REHEARSED, device=device) % architecture.vocab_size
        expected = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
        self.model.set_attn_implementation(_ATTENTION)
        arena = torch.zeros(1, dtype=torch.uint8, device=device)
        found = []
        for start, stop in ((0, _REHEARSED - 2), (_REHEARSED - 2, _REHEARSED)):
            step = self._rehearsal_step(ids[start:stop], start, arena)
            arena = step.arena
            found.append(self.forward(step.tokens, step))
            self._check_layers()
        difference = float((torch.cat(cast("list[torch.Tensor]", found)) - expected).abs().max())
        allowed = _ROUNDING[self.build.dtype] * float(expected.abs().max())
        if not difference <= allowed:
            raise Unsupported(
                f"{architecture.family} gives other logits over paged attention than by itself (off by "
                f"{difference:.2g}, rounding explains {allowed:.2g}): it keeps more than keys and values"
            )

    def _rehearsal_step(self, ids: torch.Tensor, start: int, arena: torch.Tensor) -> StepBatch:
        architecture, device, attention = self.build.architecture, self.build.device, GatherAttention()
        shape = KvShape(architecture.num_layers, architecture.num_kv_heads, architecture.head_dim, 16, self.build.dtype)
        num_bytes, stop = attention.block_bytes(shape), start + len(ids)
        return StepBatch(
            tokens=ids.int(),
            positions=torch.arange(start, stop, dtype=torch.int32, device=device),
            query_starts=torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
            context_lengths=torch.tensor([stop], dtype=torch.int32, device=device),
            block_places=torch.zeros((1, 1), dtype=torch.int32, device=device),
            wanted_rows=torch.arange(len(ids), device=device),
            arena=arena if len(arena) == num_bytes else torch.zeros(num_bytes, dtype=torch.uint8, device=device),
            kv_shape=shape,
            attention=attention,
            max_query=len(ids),
            max_context=stop,
        )

    def _check_layers(self) -> None:
        layers, seen = self.build.architecture.num_layers, self._current.seen
        if seen != list(range(layers)):
            raise Unsupported(
                f"{self.build.architecture.family} doesn't attend once in each of its {layers} layers through "
                f"transformers' attention interface (seen: {seen}); it can't be served from paged blocks"
            )


@dataclass(slots=True)
class _Heads:
    """What an attention backend asks of a layer whose queries and keys are rotated and normed already."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    rope: None = None
    q_norm: None = None
    k_norm: None = None


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention contract: [1, heads, T, dim] each → [1, T, heads, dim]."""
    current: _Current = module.enginehouse_current
    assert current.step is not None, "bug: attention outside a step"
    shape = current.step.kv_shape
    heads = _heads(module, query, key, scaling, kwargs)
    found = (key.shape[1], key.shape[3], value.shape[3])
    if attention_mask is not None or found != (shape.num_kv_heads, shape.head_dim, shape.head_dim):
        raise Unsupported(
            f"layer {heads.index} has {found[0]} key heads of {found[1]} and values of {found[2]}, config.json "
            f"says {shape.num_kv_heads} of {shape.head_dim}, or it brings a mask of its own"
        )
    current.seen.append(heads.index)
    rows = [part[0].transpose(0, 1).flatten(1) for part in (query, key, value)]
    out = current.step.attention.attend(cast("AttentionLayer", heads), torch.cat(rows, 1), current.step)
    return out.view(1, out.shape[0], query.shape[1], query.shape[3]), None


def _heads(
    module: Any, query: torch.Tensor, key: torch.Tensor, scaling: float | None, asked: Mapping[str, Any]
) -> _Heads:
    unknown = [name for name in _NOT_OURS if asked.get(name) is not None]
    if unknown or asked.get("is_causal") is False:
        raise Unsupported(f"{type(module).__name__} asks attention for {', '.join(unknown) or 'both directions'}")
    return _Heads(
        index=int(module.layer_idx),
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=query.shape[3],
        scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        window=int(asked.get("sliding_window") or 0),
        softcap=float(asked.get("softcap") or 0.0),
    )


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Paged attention knows by itself who may see whom."""
