# ruff: noqa: RUF009 (the flags are dataclasses.field with a name for their group)
"""What the operator asked for: every option of the server as one frozen dataclass.

A field is a flag: `http_port` is `--http-port`, ENGINEHOUSE_HTTP_PORT and `http-port:` in the YAML of
`--config-file`. Names and defaults are Triton's; options of our own stand in the last groups. To add an
option, add a field. What depends on several options is checked here, once, by `parse_options`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from enginehouse import option_checks, option_parsing, option_values
from enginehouse.option_parsing import HelpRequested, flag
from enginehouse.option_values import (
    DeviceValue,
    MemoryLimit,
    OptionError,
    RateLimitResource,
    RestrictedGroup,
    Setting,
    boolean,
    byte_size,
    count,
    integer,
    number,
    pattern,
    port,
    text,
)

__all__ = ["HelpRequested", "ModelControlMode", "OptionError", "ServerOptions", "parse_options", "usage"]


class ModelControlMode(StrEnum):
    NONE = "none"
    POLL = "poll"
    EXPLICIT = "explicit"


class RateLimitMode(StrEnum):
    OFF = "off"
    EXECUTION_COUNT = "execution_count"


class LogFormat(StrEnum):
    DEFAULT = "default"
    ISO8601 = "ISO8601"
    JSON = "json"


class CompressionLevel(StrEnum):
    NONE = "none"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


_server = partial(flag, "Server")
_repository = partial(flag, "Model repository")
_http = partial(flag, "HTTP")
_grpc = partial(flag, "gRPC")
_logging = partial(flag, "Logging")
_trace = partial(flag, "Trace")
_metrics = partial(flag, "Metrics")
_cloud = partial(flag, "SageMaker and Vertex AI")
_cache = partial(flag, "Response cache and rate limiter")
_memory = partial(flag, "Memory and devices")
_backends = partial(flag, "Backends")
_openai = partial(flag, "OpenAI front end")
_hosts = partial(flag, "Hosts (Enginehouse's own)")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """See the flags' help texts. `warnings` are lines for stderr, printed by who parsed."""

    id: str = _server("triton", text, "Identifier of this server: the name in its metadata.")
    api_key: tuple[str, ...] = _server(
        (), text, "Demand 'Authorization: Bearer <key>' over HTTP and gRPC; health stays open."
    )
    exit_timeout_secs: int = _server(30, integer, "Seconds to wait at exit for requests in flight.")
    exit_on_error: bool = _server(True, boolean, "Exit if a model fails to load at start.")
    strict_readiness: bool = _server(
        True, boolean, "Ready only if every model is; else as soon as the server can answer."
    )
    config_file: str = _server("", text, "YAML file of options; flags and variables override it.")
    drain_delay_secs: float = _server(
        0.0, number, "At SIGTERM: seconds to say 'not ready' and still accept, so that load balancers notice."
    )

    tenant_header: str = _server(
        "x-tenant", text, "HTTP header or gRPC metadata that names a request's tenant; empty: none."
    )

    model_repository: tuple[str, ...] = _repository(
        (), text, "Folder or s3://, gs://, as://, hf:// address that holds models.", aliases=("model-store",)
    )
    model_control_mode: ModelControlMode = _repository(
        ModelControlMode.NONE,
        option_values.choice(ModelControlMode, "model-control-mode"),
        "none: all at start; poll: follow the folder; explicit: by request.",
    )
    repository_poll_secs: float = _repository(
        15.0, number, "Seconds between looks at repositories that can't be watched."
    )
    repository_settle_ms: int = _repository(
        1000, count, "A folder that changed is loaded when nothing in it changed for so long."
    )
    load_model: tuple[str, ...] = _repository((), text, "With mode explicit: model to load at start; * means all.")
    disable_auto_complete_config: bool = _repository(
        False, boolean, "Take configs as they are written; complete nothing."
    )
    strict_model_config: bool | None = _repository(
        None, boolean, "Require complete configs.", deprecated="--disable-auto-complete-config"
    )
    model_config_name: str = _repository(
        "", option_values.config_name, "Prefer configs/<name>.pbtxt of each model over its config.pbtxt."
    )
    model_load_thread_count: int = _repository(4, count, "Models that load at the same time.")
    model_load_retry_count: int = _repository(0, count, "Further tries when a model fails to load.")
    model_namespacing: bool = _repository(False, boolean, "Allow models of the same name in different repositories.")
    repoagent_directory: str = _repository("", text, "Folder of repository agents (<name>/agent.py).")
    download_directory: str = _repository(
        "", text, "Where remote repositories are kept; default: a folder in the user's cache."
    )

    allow_http: bool = _http(True, boolean, "Serve HTTP.")
    http_address: str = _http("0.0.0.0", text, "Address to listen on, or unix:<path>.")
    http_port: int = _http(8000, port, "Port to listen on.")
    reuse_http_port: bool = _http(False, boolean, "Set SO_REUSEPORT.")
    http_header_forward_pattern: str = _http("", pattern, "Headers that match become request parameters.")
    http_thread_count: int = _http(8, count, "One event loop serves all connections.", has_effect=False)
    http_max_input_size: int = _http(
        67108864,
        option_values.at_least_one("http-max-input-size"),
        "Largest request body in bytes, also after decompression.",
    )
    cors_allowed_origin: tuple[str, ...] = _http(
        (), text, "Let pages of this origin (https://host, or * for all) ask from browsers."
    )
    http_use_ssl: bool = _http(False, boolean, "Serve TLS (HTTPS).")
    http_use_ssl_mutual: bool = _http(False, boolean, "Serve TLS and demand client certificates.")
    http_server_cert: str = _http("", text, "PEM certificate of the server.")
    http_server_key: str = _http("", text, "PEM key of the server.")
    http_root_cert: str = _http("", text, "PEM certificates that sign clients'.")
    allow_console: bool = _http(True, boolean, "Serve the console at /console, and at / to browsers.")
    http_restricted_api: tuple[RestrictedGroup, ...] = _http(
        (), option_values.restricted("http-restricted-api", "api"), "These APIs answer only with the header."
    )

    allow_grpc: bool = _grpc(True, boolean, "Serve gRPC.")
    grpc_address: str = _grpc("0.0.0.0", text, "Address to listen on, or unix:<path>.")
    grpc_port: int = _grpc(8001, port, "Port to listen on.")
    reuse_grpc_port: bool = _grpc(False, boolean, "Set SO_REUSEPORT.")
    grpc_header_forward_pattern: str = _grpc("", pattern, "Metadata that match become request parameters.")
    grpc_infer_thread_count: int = _grpc(
        2, option_values.grpc_threads, "Threads of Triton's; there are none here.", has_effect=False
    )
    grpc_infer_allocation_pool_size: int = _grpc(
        8, count, "Triton's pool of messages; there is none here.", has_effect=False
    )
    grpc_max_response_pool_size: int = _grpc(
        2147483647,
        option_values.at_least_one("grpc-max-response-pool-size"),
        "Answers of one stream that may wait for a slow client.",
        has_effect=False,
    )
    grpc_use_ssl: bool = _grpc(False, boolean, "Serve TLS.")
    grpc_use_ssl_mutual: bool = _grpc(False, boolean, "Serve TLS and demand client certificates.")
    grpc_server_cert: str = _grpc("", text, "PEM certificate of the server.")
    grpc_server_key: str = _grpc("", text, "PEM key of the server.")
    grpc_root_cert: str = _grpc("", text, "PEM certificates that sign clients'.")
    grpc_infer_response_compression_level: CompressionLevel = _grpc(
        CompressionLevel.NONE,
        option_values.choice(CompressionLevel, "grpc-infer-response-compression-level"),
        "Compression of answers.",
    )
    grpc_keepalive_time: int = _grpc(7200000, integer, "Milliseconds of silence before a ping.")
    grpc_keepalive_timeout: int = _grpc(20000, integer, "Milliseconds to wait for a ping's answer.")
    grpc_keepalive_permit_without_calls: bool = _grpc(False, boolean, "Ping connections without calls too.")
    grpc_http2_max_pings_without_data: int = _grpc(2, integer, "Pings without data in between.")
    grpc_http2_min_recv_ping_interval_without_data: int = _grpc(
        300000, integer, "Milliseconds a client must leave between pings."
    )
    grpc_http2_max_ping_strikes: int = _grpc(2, integer, "Bad pings before the connection is closed.")
    grpc_max_connection_age: int = _grpc(0, count, "Milliseconds a connection may live; 0 is forever.")
    grpc_max_connection_age_grace: int = _grpc(0, count, "Milliseconds for the calls of a connection that is too old.")
    grpc_restricted_protocol: tuple[RestrictedGroup, ...] = _grpc(
        (),
        option_values.restricted("grpc-restricted-protocol", "protocol"),
        "These protocols answer only with the metadata triton-grpc-protocol-<key>.",
    )

    log_verbose: int = _logging(0, option_values.verbosity, "Verbose level; 0 is off.")
    log_info: bool = _logging(True, boolean, "Log information.")
    log_warning: bool = _logging(True, boolean, "Log warnings.")
    log_error: bool = _logging(True, boolean, "Log errors.")
    log_format: LogFormat = _logging(
        LogFormat.DEFAULT,
        option_values.choice(LogFormat, "log-format"),
        "default, ISO8601, or json (one object a line).",
    )
    log_file: str = _logging("", text, "Log here instead of to the console.")

    trace_config: tuple[Setting, ...] = _trace(
        (),
        option_values.setting("trace-config", "trace mode"),
        "level=, rate=, count=, mode=; triton,file=; triton,log-frequency=; opentelemetry,url=; "
        "opentelemetry,resource=; opentelemetry,bsp_*=.",
    )
    trace_file: str = _trace("", text, "File of traces.", deprecated="--trace-config triton,file=<filepath>")
    trace_level: tuple[str, ...] = _trace(
        (), text, "OFF, TIMESTAMPS, TENSORS.", deprecated="--trace-config level=<OFF|TIMESTAMPS|TENSORS>"
    )
    trace_rate: int | None = _trace(
        None, integer, "One request in so many.", deprecated="--trace-config rate=<rate value>"
    )
    trace_count: int | None = _trace(
        None, integer, "Traces before it stops.", deprecated="--trace-config count=<count value>"
    )
    trace_log_frequency: int | None = _trace(
        None,
        integer,
        "Traces in one file.",
        deprecated="--trace-config triton,log-frequency=<log frequency value>",
    )

    allow_metrics: bool = _metrics(True, boolean, "Serve Prometheus metrics.")
    allow_gpu_metrics: bool = _metrics(True, boolean, "With metrics of GPUs.")
    allow_cpu_metrics: bool = _metrics(True, boolean, "With metrics of the CPU.")
    metrics_address: str = _metrics("", text, "Address to listen on; that of HTTP if not given.")
    metrics_port: int = _metrics(8002, port, "Port to listen on.")
    metrics_interval_ms: float = _metrics(2000.0, number, "GPU and CPU are read at most so often.")
    response_statistics: bool = _metrics(
        False, boolean, "Count the answers of decoupled requests by index in the statistics."
    )
    metrics_config: tuple[Setting, ...] = _metrics(
        (),
        option_values.setting("metrics-config", "metrics", scoped=False),
        "counter_latencies=, histogram_latencies=, summary_latencies=, summary_quantiles=.",
    )

    allow_sagemaker: bool = _cloud(False, boolean, "Serve SageMaker's routes.")
    sagemaker_port: int = _cloud(8080, port, "Port of SageMaker's routes.")
    sagemaker_safe_port_range: tuple[int, int] | None = _cloud(
        None, option_values.port_range, "Ports that SageMaker allows for the other front ends."
    )
    sagemaker_thread_count: int = _cloud(8, count, "Threads of Triton's; there are none here.", has_effect=False)
    allow_vertex_ai: bool = _cloud(False, boolean, "Serve Vertex AI's routes.")
    vertex_ai_port: int = _cloud(8080, port, "Port of Vertex AI's routes.")
    vertex_ai_thread_count: int = _cloud(8, count, "Threads of Triton's; there are none here.", has_effect=False)
    vertex_ai_default_model: str = _cloud("", text, "Model of requests that name none.")

    cache_config: tuple[Setting, ...] = _cache(
        (),
        option_values.setting("cache-config", "cache name", scoped=True),
        "local,size=<bytes>; redis,host=; redis,port=; …",
    )
    cache_directory: str = _cache("", text, "Folder of response caches of your own (<name>/cache.py).")
    response_cache_byte_size: int | None = _cache(None, count, "Bytes of the local cache.", deprecated="--cache-config")
    rate_limit: RateLimitMode = _cache(
        RateLimitMode.OFF,
        option_values.choice(RateLimitMode, "rate-limit"),
        "Whether instances wait for the resources that their config names.",
    )
    rate_limit_resource: tuple[RateLimitResource, ...] = _cache(
        (), option_values.rate_limit_resource, "How much there is of a resource."
    )

    allow_client_shm: bool = _memory(False, boolean, "Let clients register shared memory.")
    pinned_memory_pool_byte_size: int = _memory(268435456, count, "Bytes of pinned host memory.")
    cuda_memory_pool_byte_size: tuple[DeviceValue, ...] = _memory(
        (), option_values.device_value, "The device's process keeps its own pool.", has_effect=False
    )
    cuda_virtual_address_size: tuple[DeviceValue, ...] = _memory(
        (), option_values.device_value, "The device's process keeps its own pool.", has_effect=False
    )
    min_supported_compute_capability: float = _memory(0.0, number, "GPUs below it are not used.")
    buffer_manager_thread_count: int = _memory(0, count, "Tensors are copied where they are joined.", has_effect=False)
    host_policy: tuple[Setting, ...] = _memory(
        (),
        option_values.setting("host-policy", "policy name", scoped=True),
        "numa-node= and cpu-cores= of a host policy.",
    )
    model_load_gpu_limit: tuple[DeviceValue, ...] = _memory(
        (), option_values.device_value, "Refuse to load onto a GPU that is fuller than this fraction."
    )
    enable_peer_access: bool = _memory(True, boolean, "Let GPUs read each other's memory.", has_effect=False)
    memory_limit: tuple[MemoryLimit, ...] = _memory(
        (), option_values.memory_limit, "What the ledger may hand out: cpu=8GiB, cuda:0=90%."
    )
    allow_cpu_fallback: bool = _memory(False, boolean, "Place KIND_GPU instances on the CPU where there is no GPU.")
    simulated_device: tuple[int, ...] = _memory(
        (), byte_size, "A pretended GPU of so many bytes, for tests of placement."
    )

    backend_directory: str = _backends("", text, "Folder of backends of your own (<name>/model.py).")
    backend_config: tuple[Setting, ...] = _backends(
        (), option_values.setting("backend-config", "backend name"), "Option of a backend, or of all."
    )

    allow_openai: bool = _openai(True, boolean, "Serve the OpenAI API.")
    openai_address: str = _openai("", text, "Address to listen on; that of HTTP if not given.")
    openai_port: int | None = _openai(
        None, port, "Port of its own; without it the API is served beside the others on HTTP's port."
    )
    openai_restricted_api: tuple[str, ...] = _openai(
        (), text, "These APIs answer only with the header: <api>,<api> <header> <value>.", num_words=3
    )
    default_max_tokens: int = _openai(16, count, "Tokens of a completion that sets no limit.")
    tool_call_parser: str = _openai(
        "", text, "How models write tool calls: hermes, llama3, mistral; default: by the model.", has_effect=False
    )
    chat_template: str = _openai("", text, "File with a chat template that replaces the models' own.")
    trust_request_chat_template: bool = _openai(
        False, boolean, "Let requests bring chat templates: programs, which may take time and memory as they like."
    )
    lora_separator: str = _openai(
        "", text, "What stands between model and adapter in a model's name.", has_effect=False
    )

    default_host: tuple[Setting, ...] = _hosts(
        (),
        option_values.setting("default-host", "backend name", scoped=False),
        "Where instances of a backend live: <backend>=thread|process|device.",
    )
    host_start_timeout_secs: float = _hosts(300.0, number, "Seconds for a host process to start and load.")
    host_unload_timeout_secs: float = _hosts(
        60.0, number, "Seconds without an answer after which a model that is to go is ended."
    )
    host_heartbeat_timeout_secs: float = _hosts(30.0, number, "Seconds of silence before a host counts as stuck.")
    host_restart_limit: int = _hosts(5, count, "Restarts of a host within the window before it is given up.")
    host_restart_window_secs: float = _hosts(300.0, number, "The window of --host-restart-limit.")
    warnings: tuple[str, ...] = ()

    @property
    def metrics_host(self) -> str:
        return self.metrics_address or self.http_address

    @property
    def openai_host(self) -> str:
        return self.openai_address or self.http_address

    @property
    def complete_configs(self) -> bool:
        """Whether configs are completed from the artifacts."""
        return not (self.disable_auto_complete_config or self.strict_model_config)

    @property
    def caches(self) -> Mapping[str, Mapping[str, str]]:
        """Settings by cache name; empty without a cache."""
        if self.response_cache_byte_size is not None:
            return {"local": {"size": str(self.response_cache_byte_size)}}
        return settings_by_scope(self.cache_config)

    @property
    def backend_options(self) -> Mapping[str, Mapping[str, str]]:
        """Settings by backend name; those under "" go to every backend."""
        return settings_by_scope(self.backend_config)


def settings_by_scope(settings: Sequence[Setting]) -> dict[str, dict[str, str]]:
    """A later setting of the same key wins."""
    grouped: dict[str, dict[str, str]] = {}
    for item in settings:
        grouped.setdefault(item.scope, {})[item.key] = item.value
    return grouped


def usage() -> str:
    return "Usage: enginehouse serve [options]\n" + option_parsing.usage(ServerOptions)


def parse_options(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> ServerOptions:
    """Raises OptionError with a text for stderr, HelpRequested for -h. `argv` lacks the program's name."""
    environment = os.environ if environment is None else environment
    try:
        parsed = option_parsing.parse(ServerOptions, argv, environment)
    except HelpRequested:
        raise HelpRequested(usage()) from None
    values = {**option_checks.cloud_defaults(environment), **parsed.values}
    options = ServerOptions(**values, warnings=parsed.warnings)
    option_checks.refuse_conflicts(options)
    if not options.allow_metrics:
        options = replace(options, allow_gpu_metrics=False, allow_cpu_metrics=False)
    if options.grpc_use_ssl_mutual:
        options = replace(options, grpc_use_ssl=True)
    if options.http_use_ssl_mutual:
        options = replace(options, http_use_ssl=True)
    return replace(options, warnings=options.warnings + option_checks.warnings(options))
