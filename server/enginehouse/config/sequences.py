"""Whether a sequence batcher's controls are right, with Triton's texts. No I/O here."""

from __future__ import annotations

from collections.abc import Iterator

from enginehouse.config.problems import Problem
from enginehouse.config.schema import (
    TYPE_INT32,
    TYPE_INT64,
    TYPE_STRING,
    TYPE_UINT32,
    TYPE_UINT64,
    ModelConfig,
    ModelSequenceBatching,
)

Control = ModelSequenceBatching.Control
BOOLEAN_KINDS = (Control.CONTROL_SEQUENCE_START, Control.CONTROL_SEQUENCE_END, Control.CONTROL_SEQUENCE_READY)
CORRELATION_TYPES = (TYPE_UINT64, TYPE_INT64, TYPE_UINT32, TYPE_INT32, TYPE_STRING)
_VALUE_FIELDS = ("int32_false_true", "fp32_false_true", "bool_false_true")
_PLACE = "sequence_batching"


def check_sequence_batching(config: ModelConfig) -> Iterator[Problem]:
    name, batching = config.name, config.sequence_batching
    if config.response_cache.enable:
        yield Problem(
            f"Response Cache does not currently support model {name} with sequence batching scheduler. "
            "Please disable the response cache.",
            "response_cache",
        )
    yield from _check_names(config)
    for kind in BOOLEAN_KINDS:
        yield from _check_boolean_control(config, kind)
    yield from _check_correlation_control(config)
    for index, size in enumerate(batching.oldest.preferred_batch_size):
        place = f"{_PLACE}.oldest.preferred_batch_size[{index}]"
        if size <= 0:
            yield Problem(f"sequence batching preferred batch size must be positive for {name}", place)
        elif size > config.max_batch_size:
            yield Problem(
                f"sequence batching preferred batch size must be <= max batch size for {name}", place
            )
    if not 0.0 <= batching.direct.minimum_slot_utilization <= 1.0:
        yield Problem(
            f"sequence batching minimum slot utilization must be in range (0.0, 1.0] for {name}",
            f"{_PLACE}.direct.minimum_slot_utilization",
        )


def _check_names(config: ModelConfig) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, control_input in enumerate(config.sequence_batching.control_input):
        place = f"{_PLACE}.control_input[{index}]"
        if not control_input.name:
            yield Problem(f"sequence batching control tensor must have a name for {config.name}", place)
        elif control_input.name in seen:
            yield Problem(
                f"sequence batching control tensor '{control_input.name}' is specified for multiple control "
                f"kinds for {config.name}",
                place,
            )
        seen.add(control_input.name)


def _controls(config: ModelConfig, kind: int) -> Iterator[tuple[str, ModelSequenceBatching.Control]]:
    for index, control_input in enumerate(config.sequence_batching.control_input):
        for number, control in enumerate(control_input.control):
            if control.kind == kind:
                yield f"{_PLACE}.control_input[{index}].control[{number}]", control


def _check_boolean_control(config: ModelConfig, kind: int) -> Iterator[Problem]:
    kind_name, name = Control.Kind.Name(kind), config.name
    for number, (place, control) in enumerate(_controls(config, kind)):
        if number > 0:
            yield Problem(f"sequence batching specifies multiple {kind_name} tensors for {name}", place)
            return
        given = [field for field in _VALUE_FIELDS if len(getattr(control, field))]
        if not given:
            yield Problem(
                "sequence batching must specify either 'int32_false_true', 'fp32_false_true' or "
                f"'bool_false_true' for {kind_name} for {name}",
                place,
            )
        elif len(given) > 1:
            yield Problem(
                "sequence batching specifies more than one from 'int32_false_true', 'fp32_false_true' and "
                f"'bool_false_true' for {kind_name} for {name}",
                place,
            )
        elif len(getattr(control, given[0])) != 2:
            yield Problem(
                f"sequence batching control '{given[0]}' must have exactly 2 entries for {kind_name} "
                f"for {name}",
                f"{place}.{given[0]}",
            )


def _check_correlation_control(config: ModelConfig) -> Iterator[Problem]:
    kind_name, name = Control.Kind.Name(Control.CONTROL_SEQUENCE_CORRID), config.name
    for number, (place, control) in enumerate(_controls(config, Control.CONTROL_SEQUENCE_CORRID)):
        if number > 0:
            yield Problem(f"sequence batching specifies multiple {kind_name} tensors for {name}", place)
            return
        if any(len(getattr(control, field)) for field in _VALUE_FIELDS):
            yield Problem(
                "sequence batching must not specify either 'int32_false_true', 'fp32_false_true' or "
                f"'bool_false_true' for {kind_name} for {name}",
                place,
            )
        elif control.data_type not in CORRELATION_TYPES:
            yield Problem(
                f"unexpected data type for control {kind_name} for {name}. Allowed data types are "
                "TYPE_UINT64, TYPE_INT64, TYPE_UINT32, TYPE_INT32 and TYPE_STRING",
                f"{place}.data_type",
            )
