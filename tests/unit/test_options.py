"""Flags, variables and the YAML file: what is accepted, what is refused, and with which text."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from enginehouse.option_values import MemoryLimit, RateLimitResource, RestrictedGroup, Setting
from enginehouse.options import (
    HelpRequested,
    LogFormat,
    ModelControlMode,
    OptionError,
    RateLimitMode,
    ServerOptions,
    parse_options,
    usage,
)


def parse(*argv: str, **environment: str) -> ServerOptions:
    return parse_options(argv, environment)


def refusal(*argv: str, **environment: str) -> str:
    with pytest.raises(OptionError) as caught:
        parse(*argv, **environment)
    return str(caught.value)


def test_defaults_are_tritons() -> None:
    options = parse()
    assert (options.http_port, options.grpc_port, options.metrics_port) == (8000, 8001, 8002)
    assert options.id == "triton"
    assert options.exit_timeout_secs == 30
    assert options.http_max_input_size == 64 * 1024 * 1024
    assert not options.allow_client_shm
    assert options.model_control_mode is ModelControlMode.NONE


@pytest.mark.parametrize(
    "argv", [["--http-port=18500"], ["--http-port", "18500"], ["--http-port=1", "--http-port=18500"]]
)
def test_a_value_follows_an_equals_sign_or_a_space_and_the_last_one_wins(argv: list[str]) -> None:
    assert parse(*argv).http_port == 18500


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--allow-grpc=false"], False),
        (["--allow-grpc", "0"], False),
        (["--allow-grpc=OFF"], False),
        (["--allow-grpc"], True),
        (["--allow-grpc", "--http-port=1"], True),
    ],
)
def test_booleans_may_stand_alone(argv: list[str], expected: bool) -> None:
    assert parse(*argv).allow_grpc is expected


def test_a_beginning_that_only_one_flag_has_stands_for_it() -> None:
    assert not parse("--log-warn=false").log_warning
    assert parse("--model-repo", "/a").model_repository == ("/a",)
    assert "unrecognized option '--http'" in refusal("--http=1")


def test_repeated_flags_and_aliases_collect() -> None:
    options = parse("--model-repository=/a", "--model-store", "/b", "--load-model=x", "--load-model=y",
                    "--model-control-mode=explicit")  # fmt: skip
    assert options.model_repository == ("/a", "/b")
    assert options.load_model == ("x", "y")


def test_structured_values() -> None:
    options = parse(
        "--model-control-mode=EXPLICIT",
        "--cache-config=local,size=1048576",
        "--backend-config=python,shm-region-prefix-name=p_1",
        "--backend-config=default-max-batch-size=4",
        "--http-restricted-api=model-repository,logging:admin-key=letmein",
        "--rate-limit=execution_count",
        "--rate-limit-resource=slot:2:0",
        "--rate-limit-resource=other:1",
        "--memory-limit=cpu=8GiB",
        "--memory-limit=cuda:0=90%",
        "--log-format=iso8601",
        "--log-verbose=true",
        "--trace-config=triton,file=/dev/null",
    )
    assert options.model_control_mode is ModelControlMode.EXPLICIT
    assert options.caches == {"local": {"size": "1048576"}}
    assert options.backend_options == {
        "python": {"shm-region-prefix-name": "p_1"},
        "": {"default-max-batch-size": "4"},
    }
    assert options.http_restricted_api == (RestrictedGroup(("model-repository", "logging"), "admin-key", "letmein"),)
    assert options.rate_limit is RateLimitMode.EXECUTION_COUNT
    assert options.rate_limit_resource == (RateLimitResource("slot", 2, 0), RateLimitResource("other", 1, -1))
    assert options.memory_limit == (
        MemoryLimit("cpu", num_bytes=8 << 30),
        MemoryLimit("cuda:0", fraction=0.9),
    )
    assert options.log_format is LogFormat.ISO8601
    assert options.log_verbose == 1
    assert options.trace_config == (Setting("triton", "file", "/dev/null"),)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--htp-port=1"], "unrecognized option '--htp-port': did you mean '--http-port'?"),
        (["--model-repositry", "x"], "did you mean '--model-repository'?"),
        (["repository"], "Unexpected argument: repository"),
        (["--http-port"], "option '--http-port' requires an argument"),
        (["--http-port=eight"], 'Bad option: "--http-port".\nInvalid option value. Got eight'),
        (["--http-port=70000"], "Provided option value is out of bound. Got 70000"),
        (["--exit-on-error=perhaps"], "invalid value for bool option: perhaps"),
        (["--model-control-mode=always"], "invalid argument for --model-control-mode"),
        (["--rate-limit=slow"], "invalid argument for --rate-limit"),
        (["--rate-limit-resource=R"], "option format is '<resource_name>:<count>:<device>'"),
        (["--cache-config=size=3"], "No cache specified. --cache-config option format is"),
        (["--cache-config=local,x"], "--cache-config option format is '<cache name>,<setting>=<value>'. Got local,x"),
        (["--backend-config=python,x"], "--backend-config option format is '<backend name>,<setting>=<value>'. Got"),
        (["--backend-config=,a=b"], "No backend specified. --backend-config option format is <backend name>,<setting>"),
        (["--trace-config=,a=b"], "<trace mode>,<setting>=<value> or <setting>=<value>. Got ,a=b"),
        (["--grpc-infer-thread-count=1"], "Must be in the range 2 to 128."),
        (["--grpc-max-response-pool-size=0"], "Error: --grpc-max-response-pool-size must be greater than 0."),
        (["--http-max-input-size=0"], "Error: --http-max-input-size must be greater than 0."),
        (["--model-config-name="], "Error: empty argument for --model-config-name"),
        (["--metrics-config=a,b=c"], "--metrics-config option format is <setting>=<value>. Got a,b=c"),
        (["--http-restricted-api=model-reposit:k=v"], "unknown restricted api 'model-reposit'"),
        (["--grpc-restricted-protocol=model-reposit:k=v"], "unknown restricted protocol 'model-reposit'"),
        (["--http-header-forward-pattern=("], "invalid regular expression"),
    ],
)
def test_refusals_name_the_flag_and_what_is_wrong(argv: list[str], text: str) -> None:
    assert text in refusal(*argv)


@pytest.mark.parametrize(
    "written", [["=inference key value"], ["", "inference", "key", "value"], ["=inference:key=value"]]
)
def test_three_arguments_may_be_one_restriction(written: list[str]) -> None:
    argv = [f"--openai-restricted-api{written[0]}", *written[1:], "--model-repository=m", "--http-port=9"]
    options = parse_options(argv, {})
    assert (options.openai_restricted_api[0].replace(":", " ").replace("=", " "), options.http_port) == (
        "inference key value", 9,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--response-cache-byte-size=1", "--cache-config=redis,host=h"], "incompatible flags"),
        (["--cache-config=local,size=1", "--cache-config=redis,host=h"], "multiple cache configurations"),
        (["--load-model=x"], "error: use of '--load-model' requires setting '--model-control-mode=explicit' as well."),
        (
            ["--model-control-mode=explicit", "--load-model=*", "--load-model=x"],
            "wildcard model name '*' must be the only startup model",
        ),
        (["--grpc-port=8000"], "listen to http requests and grpc requests at the same address and port 0.0.0.0:8000"),
        (["--grpc-port=8000", "--grpc-address=1.2.3.4"], "http requests and grpc requests at the same port 8000"),
        (
            ["--http-restricted-api=health:a=b", "--http-restricted-api=metadata,health:c=d"],
            "api 'health' can not be specified in multiple config groups",
        ),
    ],
)
def test_conflicts_between_flags_are_refused(argv: list[str], text: str) -> None:
    assert text in refusal(*argv).lower()


def test_sagemaker_says_which_ports_the_others_may_have() -> None:
    flags = ["--allow-sagemaker=true", "--sagemaker-safe-port-range=8000-8001"]
    assert "requests at port 8002, allowed port range is [8000, 8001]" in refusal(*flags)
    assert parse(*flags, "--allow-metrics=false").sagemaker_safe_port_range == (8000, 8001)


def test_flags_without_effect_say_so() -> None:
    options = parse("--http-thread-count=4")
    assert options.warnings == ("Warning: '--http-thread-count' has no effect on this server.",)


def test_every_flag_is_read_somewhere_or_says_that_it_has_no_effect() -> None:
    root = Path(__file__).resolve().parents[2]
    sources = [*root.glob("server/**/*.py"), *root.glob("backends/**/*.py")]
    text = "\n".join(path.read_text() for path in sources)
    for field in dataclasses.fields(ServerOptions):
        known = field.metadata.get("flag")
        if known is not None and field.name != "config_file":  # read by the parser itself
            is_read = re.search(rf"\.{field.name}\b", text) is not None
            assert is_read == known.has_effect, field.name


def test_equal_ports_of_a_front_end_that_is_off_are_no_conflict() -> None:
    assert parse("--grpc-port=8000", "--allow-grpc=false").grpc_port == 8000


def test_deprecated_flags_work_and_warn() -> None:
    options = parse("--response-cache-byte-size=4096", "--strict-model-config=false", "--disable-auto-complete-config")
    assert options.caches == {"local": {"size": "4096"}}
    assert not options.complete_configs
    assert any("--response-cache-byte-size' has been deprecated" in line for line in options.warnings)
    assert any("Overriding deprecated '--strict-model-config'" in line for line in options.warnings)
    given = ["--trace-file=/old", "--trace-config=triton,file=/new", "--trace-rate=5", "--trace-config=level=OFF"]
    options = parse(*given)
    overriding = [line for line in options.warnings if "Overriding" in line]
    assert overriding == ["Warning: Overriding deprecated '--trace-file' in favor of provided file in --trace-config!"]


def test_a_flag_beats_a_variable_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("http-port: 1\ngrpc_port: 2\nmetrics-port: 3\n")
    options = parse(f"--config-file={file}", "--http-port=11", ENGINEHOUSE_HTTP_PORT="12", ENGINEHOUSE_GRPC_PORT="22")
    assert (options.http_port, options.grpc_port, options.metrics_port) == (11, 22, 3)


def test_yaml_spells_structured_flags_as_mappings(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        "model-repository: [/a, /b]\n"
        "exit-on-error: false\n"
        "cache-config: {local: {size: 1048576}}\n"
        "trace-config: {rate: 5, triton: {file: /tmp/t.json}}\n"
    )
    options = parse(f"--config-file={file}")
    assert options.model_repository == ("/a", "/b")
    assert not options.exit_on_error
    assert options.cache_config == (Setting("local", "size", "1048576"),)
    assert set(options.trace_config) == {Setting("", "rate", "5"), Setting("triton", "file", "/tmp/t.json")}


def test_an_unknown_key_of_the_file_names_file_and_neighbour(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("htpp-port: 1\n")
    text = refusal(f"--config-file={file}")
    assert str(file) in text
    assert "did you mean '--http-port'?" in text


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "can't read --config-file" in refusal(f"--config-file={tmp_path / 'no.yaml'}")


def test_variables_hold_several_values_and_near_misses_warn() -> None:
    options = parse(ENGINEHOUSE_MODEL_REPOSITORY="/a;/b", ENGINEHOUSE_HTPP_PORT="1", ENGINEHOUSE_OTHER="x")
    assert options.model_repository == ("/a", "/b")
    assert len(options.warnings) == 1
    assert "ENGINEHOUSE_HTTP_PORT" in options.warnings[0]


def test_vertex_ai_containers_are_told_by_their_environment() -> None:
    options = parse(AIP_MODE="PREDICTION", AIP_HTTP_PORT="8085", AIP_STORAGE_URI="gs://bucket/models")
    assert options.allow_vertex_ai
    assert not options.allow_http
    assert options.vertex_ai_port == 8085
    assert options.model_repository == ("gs://bucket/models",)
    assert parse("--model-repository=/a", AIP_STORAGE_URI="gs://b").model_repository == ("/a",)


def test_help_is_asked_for_anywhere_and_names_every_flag() -> None:
    with pytest.raises(HelpRequested) as asked:
        parse("--http-port=1", "--help")
    text = str(asked.value)
    assert text == usage()
    for name in (
        "--http-port <port>",
        "--rate-limit <off|execution_count>",
        "--load-model",
        "--memory-limit",
    ):
        assert name in text
