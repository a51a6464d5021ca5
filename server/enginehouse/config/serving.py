"""Whether the `serving` block is right: what is ours beyond Triton's fields. No I/O here."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from enginehouse.config.problems import Problem, nearest_match
from enginehouse.config.schema import TYPE_STRING, ModelConfig, ModelInput, ModelOutput, ModelServing


def check_serving(config: ModelConfig) -> Iterator[Problem]:
    """Everything but names of tensors, which a backend may still fill in."""
    serving = config.serving
    for problem in (*_check_life(serving), *_check_tenants(serving)):
        yield _of(config, problem)
    if serving.batching.target_p99_ms < 0:
        yield _of(config, Problem("must not be negative", "batching.target_p99_ms"))
    rule = serving.batching.rule
    if rule and len(rule.split(":")) != 2:
        yield _of(config, Problem(f"'{rule}' is not 'module:function'", "batching.rule"))
    for index, padding in enumerate(serving.padding):
        for problem in _check_padding(padding, f"padding[{index}]"):
            yield _of(config, problem)


def check_serving_tensors(config: ModelConfig) -> Iterator[Problem]:
    """Names and axes of the tensors that padding speaks of."""
    inputs = {tensor.name: tensor for tensor in config.input}
    outputs = {tensor.name: tensor for tensor in config.output}
    padded = [padding.input for padding in config.serving.padding]
    for index, padding in enumerate(config.serving.padding):
        place = f"padding[{index}]"
        yield from _named(config, padding.input, inputs, f"{place}.input")
        if (tensor := inputs.get(padding.input)) is not None:
            yield from _check_axis(config, tensor, padding.axis, f"{place}.axis")
            if padding.text_value and tensor.data_type != TYPE_STRING:
                text = f"input '{tensor.name}' holds no texts; give 'value'"
                yield _of(config, Problem(text, f"{place}.text_value"))
    for index, unpadding in enumerate(config.serving.unpadding):
        place = f"unpadding[{index}]"
        yield from _named(config, unpadding.output, outputs, f"{place}.output")
        yield from _named(config, unpadding.input, padded, f"{place}.input")
        if (output := outputs.get(unpadding.output)) is not None:
            yield from _check_axis(config, output, unpadding.axis, f"{place}.axis")


def _of(config: ModelConfig, problem: Problem) -> Problem:
    field = f"serving.{problem.field}"
    return Problem(f"{field} of model '{config.name}': {problem.text}", field)


def _named(config: ModelConfig, name: str, known: Collection[str], place: str) -> Iterator[Problem]:
    if name not in known:
        nearest = nearest_match(name, known)
        hint = f"; did you mean '{nearest}'?" if nearest else ""
        names = ", ".join(f"'{each}'" for each in known) or "none"
        yield _of(config, Problem(f"there is no '{name}', only {names}{hint}", place))


def _check_axis(
    config: ModelConfig, tensor: ModelInput | ModelOutput, axis: int, place: str
) -> Iterator[Problem]:
    if not 0 <= axis < len(tensor.dims):
        text = f"'{tensor.name}' has no axis {axis}, its dims are {list(tensor.dims)}"
        yield _of(config, Problem(text, place))
    elif tensor.dims[axis] != -1:
        text = f"axis {axis} of '{tensor.name}' always has {tensor.dims[axis]} elements"
        yield _of(config, Problem(text, place))


def _check_life(serving: ModelServing) -> Iterator[Problem]:
    if serving.idle_unload_s < 0:
        yield Problem("must not be negative", "idle_unload_s")
    if serving.residency == ModelServing.RESIDENCY_TTL and not serving.idle_unload_s:
        yield Problem("RESIDENCY_TTL needs idle_unload_s", "residency")
    if serving.residency == ModelServing.RESIDENCY_PINNED and serving.idle_unload_s:
        yield Problem("a pinned model is never unloaded when idle", "idle_unload_s")
    supervision = serving.supervision
    for field in supervision.DESCRIPTOR.fields_by_name:
        if getattr(supervision, field) < 0:
            yield Problem("must not be negative", f"supervision.{field}")


def _check_padding(padding: ModelServing.Padding, place: str) -> Iterator[Problem]:
    if not padding.input:
        yield Problem("must name an input", f"{place}.input")
    buckets = list(padding.buckets)
    if any(length < 1 for length in buckets) or buckets != sorted(set(buckets)):
        yield Problem(f"{buckets} must be at least 1 and ascending", f"{place}.buckets")
    if buckets and padding.multiple_of:
        yield Problem("can't stand beside buckets", f"{place}.multiple_of")
    if not 0 <= padding.max_waste < 1:
        yield Problem(f"{padding.max_waste} must be from 0 to below 1", f"{place}.max_waste")


def _check_tenants(serving: ModelServing) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, tenant in enumerate(serving.tenants):
        place = f"tenants[{index}]"
        if not tenant.name:
            yield Problem("must have a name", place)
        elif tenant.name in seen:
            yield Problem(f"'{tenant.name}' is there twice", place)
        seen.add(tenant.name)
        if tenant.weight < 0:
            yield Problem("must not be negative", f"{place}.weight")
