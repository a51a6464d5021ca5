"""Any config survives each spelling, and ours reads what protobuf's own text format writes."""

from __future__ import annotations

import contextlib
from typing import Any

from google.protobuf import json_format, text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.config.json_form import to_wire
from enginehouse.config.problems import ConfigError
from enginehouse.config.reading import SUFFIXES, parse_config, print_config
from enginehouse.config.schema import POOL, ModelConfig

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: TEXT,
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_FLOAT: st.floats(allow_nan=False, width=32),
    FieldDescriptor.TYPE_DOUBLE: st.floats(allow_nan=False),
}


def _scalar(field: Any) -> st.SearchStrategy[Any]:
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values])
    return SCALARS[field.type]


@st.composite
def messages(draw: st.DrawFn, message: Message) -> Message:
    """Fills a few fields of `message`, whatever they are."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    for field in draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=id)) if fields else ():
        value = getattr(message, field.name)
        if field.is_repeated and field.message_type is not None and field.message_type.GetOptions().map_entry:
            parts = field.message_type.fields_by_name
            for key in draw(st.lists(_scalar(parts["key"]), max_size=2, unique=True)):
                if parts["value"].message_type is not None:
                    draw(messages(value[key]))
                else:
                    value[key] = draw(_scalar(parts["value"]))
        elif field.is_repeated and field.message_type is not None:
            for _ in range(draw(st.integers(0, 2))):
                draw(messages(value.add()))
        elif field.is_repeated:
            value.extend(draw(st.lists(_scalar(field), max_size=3)))
        elif field.message_type is not None:
            value.SetInParent()
            draw(messages(value))
        else:
            setattr(message, field.name, draw(_scalar(field)))
    return message


CONFIGS = st.builds(ModelConfig).flatmap(messages)


@given(CONFIGS, st.sampled_from(SUFFIXES))
@settings(max_examples=300, deadline=None)
def test_what_is_printed_reads_back_as_the_same_config(config: ModelConfig, suffix: str) -> None:
    assert parse_config(print_config(config, suffix), suffix).config == config


@given(CONFIGS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_protobufs_text_format_reads_as_the_same_config(config: ModelConfig, one_line: bool) -> None:
    content = text_format.MessageToString(
        config, as_one_line=one_line, use_short_repeated_primitives=one_line, descriptor_pool=POOL
    )
    assert parse_config(content, ".pbtxt").config == config


@given(CONFIGS)
@settings(max_examples=150, deadline=None)
def test_our_text_is_protobufs_text_format(config: ModelConfig) -> None:
    read: Message = text_format.Parse(print_config(config, ".pbtxt"), ModelConfig(), descriptor_pool=POOL)
    assert read == config


@given(CONFIGS)
@settings(max_examples=150, deadline=None)
def test_the_answer_to_clients_is_protobufs_json(config: ModelConfig) -> None:
    read: Message = json_format.ParseDict(to_wire(config), ModelConfig(), descriptor_pool=POOL)
    assert read == config


@given(st.sampled_from(SUFFIXES), st.text(alphabet='{}[]<>:,;"\'\\#-_. \nabf019xu&*!|', max_size=40))
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_or_refused(suffix: str, content: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_config(content, suffix)
