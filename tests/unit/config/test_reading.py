"""Files are found, read in three spellings, and refused with help."""

from __future__ import annotations

from pathlib import Path

import pytest

from enginehouse.config.problems import ConfigError
from enginehouse.config.reading import parse_config, read_config
from enginehouse.config.schema import TYPE_FP32, TYPE_STRING, ModelConfig, ModelInstanceGroup


def parse(content: str, suffix: str) -> ModelConfig:
    return parse_config(content, suffix, f"model/config{suffix}").config


def refusal(content: str, suffix: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(content, suffix)
    return str(caught.value)


def test_three_spellings_mean_the_same() -> None:
    text = 'backend: "python" input [{ name: "X" data_type: TYPE_FP32 dims: [ -1, 3 ] }] dynamic_batching { }'
    yaml = "backend: python\ninput:\n- {name: X, data_type: TYPE_FP32, dims: [-1, 3]}\ndynamic_batching: {}\n"
    json = (
        '{"backend": "python", "input": [{"name": "X", "data_type": "TYPE_FP32", "dims": ["-1", 3]}], '
        '"dynamicBatching": {}}'
    )
    assert parse(text, ".pbtxt") == parse(yaml, ".yaml") == parse(json, ".json")


def test_yaml_may_leave_out_what_is_clear() -> None:
    config = parse(
        "input: {name: X, data_type: bytes, dims: 3}\n"
        "output: {name: Y, data_type: fp32, dims: [-1], reshape: [1, 2]}\n"
        "instance_group: {kind: cpu}\n"
        "parameters: {mode: fast, limit: 12, strict: true}\n"
        "version_policy: {latest: 2}\n"
        "response_cache: true\n"
        "serving: {host: process, idle_unload_s: 0.5}\n",
        ".yaml",
    )
    assert config.input[0].data_type == TYPE_STRING
    assert list(config.input[0].dims) == [3]
    assert config.output[0].data_type == TYPE_FP32
    assert list(config.output[0].reshape.shape) == [1, 2]
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_CPU
    values = {key: config.parameters[key].string_value for key in config.parameters}
    assert values == {"mode": "fast", "limit": "12", "strict": "true"}
    assert config.version_policy.latest.num_versions == 2
    assert config.response_cache.enable
    assert config.serving.host == config.serving.HOST_PROCESS


def test_null_is_absent() -> None:
    assert parse("max_batch_size: null\ninput:\nserving: ~\n", ".yaml") == ModelConfig()


@pytest.mark.parametrize(
    ("suffix", "content", "expected"),
    [
        (".yaml", "max_batch_sise: 8\n", "config.yaml:1:1: there is no field 'max_batch_sise' in ModelConfig"),
        (".yaml", "max_batch_sise: 8\n", "did you mean max_batch_size?"),
        (".yaml", "input:\n- name: X\n  data_type: fp33\n", "config.yaml:3:14: input[0].data_type: found 'fp33'"),
        (".yaml", "input:\n- name: X\n  data_type: fp33\n", "did you mean TYPE_FP32?"),
        (".yaml", "max_batch_size: 1e99\n", "allowed: an integer from -2147483648 to 2147483647"),
        (".yaml", "max_batch_size: [1", "while parsing a flow sequence"),
        (".yaml", "name: a\nname: b\n", "config.yaml:2:1: name: given twice, first in line 1"),
        (".yaml", "dynamic_batching: {}\nsequence_batching: {}\n", "can't stand beside 'dynamic_batching' (line 1)"),
        (".yaml", "input: x\n", "input[0]: found 'x'; allowed: an object with"),
        (".yaml", "- 1\n", "found no mapping"),
        (".json", '{"name": "a",\n "max_batch_size": eight}', "config.json:2:20: found 'eight'"),
        (".json", '{"name": "a"', "found the end of the file in the object of line 1; allowed: ',' or '}'"),
        (".json", '{"max_batch_size": true}', "max_batch_size: found true; allowed: an integer"),
        (".json", '{"parameters": {"a": {"string_value": "b"}, "a": {}}}', 'parameters["a"]: given twice'),
        (".json", "[]", "found no object"),
        (".pbtxt", "max_batch_size: ${bs}", "found the placeholder ${bs}, which nobody filled in"),
        (".pbtxt", 'name: "a\n"', "found a text that doesn't end in its line"),
        (".pbtxt", "name: m", "name: found m; allowed: a quoted text"),
        (".pbtxt", "max_batch_size: 8.0", "max_batch_size: found 8.0; allowed: an integer"),
        (".pbtxt", 'input [ {name: "x" } {name: "y"} ]', "where the '[' of line 1 is still open; allowed: ',' or ']'"),
        (".pbtxt", 'input {\nname: "x"\n', "config.pbtxt:3:1: input: found the end of the file where the '{'"),
        (".pbtxt", 'backend "python"', "backend: found '\"python\"'; allowed: ':'"),
        (".pbtxt", "instance_group { kind: cpu }", "did you mean KIND_CPU?"),
        (".pbtxt", "input { dims: 099 }", "0 begins an octal one"),
        (".pbtxt", "input " + "{ reshape " * 200, "nested deeper than 100"),
        (".json", "[" * 200, "nested deeper than 100"),
        (".yaml", "a: " + "[" * 200, "config.yaml"),
    ],
)  # fmt: skip
def test_errors_say_where_what_and_what_is_allowed(suffix: str, content: str, expected: str) -> None:
    assert expected in refusal(content, suffix)


def test_text_format_reads_what_protobuf_reads() -> None:
    config = parse(
        "# a comment\n"
        "name: 'one' \" two\" # texts join\n"
        'parameters: { key: "tab" value: < string_value: "\\t\\x41\\101\\u00e9" > };\n'
        'input { name: "X" dims: 0x10 dims: [ -1, 010 ], }\n'
        "sequence_batching { control_input { control { fp32_false_true: [ -1.5e3f, inf ] } } }",
        ".pbtxt",
    )
    assert config.name == "one two"
    assert config.parameters["tab"].string_value == "\tAAé"
    assert list(config.input[0].dims) == [16, -1, 8]
    control = config.sequence_batching.control_input[0].control[0]
    assert list(control.fp32_false_true) == [-1500.0, float("inf")]


def test_positions_lead_to_the_field_or_what_holds_it() -> None:
    found = parse_config('name: "m"\ninput {\n  name: "X"\n  dims: [ 1,\n    0 ]\n}\n', ".pbtxt")
    assert found.position("input[0].dims[1]").line == 5
    assert found.position("input[0].data_type").line == 2
    assert found.position("output").line == 0


def _folder(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_a_variant_is_preferred_and_falls_back(tmp_path: Path) -> None:
    folder = _folder(
        tmp_path, {"config.yaml": "max_batch_size: 1", "configs/big.json": '{"max_batch_size": 8}'}
    )
    sizes = [
        found.config.max_batch_size for name in ("", "big", "other") if (found := read_config(folder, name))
    ]
    assert sizes == [1, 8, 1]


def test_two_config_files_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"config.yaml": "", "config.pbtxt": ""})
    with pytest.raises(
        ConfigError, match=r"found config\.pbtxt, config\.yaml; allowed: one config file a model"
    ):
        read_config(folder)


def test_a_hugging_face_config_is_not_ours(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"config.json": '{"architectures": ["BertModel"], "model_type": "bert"}'})
    assert read_config(folder) is None
    _folder(tmp_path, {"config.yaml": "max_batch_size: 3"})
    found = read_config(folder)
    assert found is not None
    assert found.config.max_batch_size == 3


def test_no_file_is_no_config(tmp_path: Path) -> None:
    assert read_config(tmp_path) is None


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_bytes(b'name: "\xff"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_config(tmp_path)
