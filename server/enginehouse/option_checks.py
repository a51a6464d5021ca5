"""What depends on several options at once: conflicts, warnings, and what a cloud's variables say.

Pure. The texts are those that scripts written for Triton look for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from enginehouse.option_values import OptionError, port, refuse_repeated_apis

if TYPE_CHECKING:
    from enginehouse.options import ServerOptions


def cloud_defaults(environment: Mapping[str, str]) -> dict[str, Any]:
    """Vertex AI tells its containers by AIP_* variables what to serve and where."""
    values: dict[str, Any] = {}
    if environment.get("AIP_MODE") == "PREDICTION":
        values.update(allow_vertex_ai=True, allow_http=False, allow_grpc=False)
    if "AIP_HTTP_PORT" in environment:
        values["vertex_ai_port"] = port(environment["AIP_HTTP_PORT"])
    if environment.get("AIP_STORAGE_URI"):
        values["model_repository"] = (environment["AIP_STORAGE_URI"],)
    return values


def refuse_conflicts(options: ServerOptions) -> None:
    """Raises OptionError."""
    if options.response_cache_byte_size is not None and options.cache_config:
        raise OptionError(
            "Error: Incompatible flags --response-cache-byte-size and --cache-config both provided. "
            "Please provide one or the other."
        )
    if len(options.caches) > 1:
        raise OptionError(
            "found multiple cache configurations, but only single cache is currently supported: "
            + ", ".join(sorted(options.caches))
        )
    if options.load_model and options.model_control_mode != "explicit":
        raise OptionError("Error: Use of '--load-model' requires setting '--model-control-mode=explicit' as well.")
    if "*" in options.load_model and len(set(options.load_model)) > 1:
        raise OptionError("Wildcard model name '*' must be the ONLY startup model if specified at all.")
    refuse_repeated_apis(options.http_restricted_api, "api")
    refuse_repeated_apis(options.grpc_restricted_protocol, "protocol")
    _check_ports(options)


def _check_ports(options: ServerOptions) -> None:
    front_ends = _listeners(options)
    safe_range = options.sagemaker_safe_port_range if options.allow_sagemaker else None
    taken: dict[int, list[tuple[str, str]]] = {}
    for name, allowed, address, number_ in front_ends:
        if not allowed or number_ == 0:
            continue
        if safe_range is not None and name != "SageMaker" and not safe_range[0] <= number_ <= safe_range[1]:
            raise OptionError(
                f"The server cannot listen to {name} requests at port {number_}, allowed port range is "
                f"[{safe_range[0]}, {safe_range[1]}]"
            )
        for other, other_address in taken.get(number_, []):
            if address == other_address:
                place = f"at the same address and port {address}:{number_}"
            elif "0.0.0.0" in (address, other_address):
                place = f"at the same port {number_}"
            else:
                continue
            raise OptionError(f"The server cannot listen to {other} requests and {name} requests {place}")
        taken.setdefault(number_, []).append((name, address))


def _listeners(options: ServerOptions) -> list[tuple[str, bool, str, int]]:
    """(what listens, whether it does, address, port)."""
    return [
        ("HTTP", options.allow_http, options.http_address, options.http_port),
        ("GRPC", options.allow_grpc, options.grpc_address, options.grpc_port),
        ("metrics", options.allow_metrics, options.metrics_host, options.metrics_port),
        ("SageMaker", options.allow_sagemaker, options.http_address, options.sagemaker_port),
        ("Vertex AI", options.allow_vertex_ai, options.http_address, options.vertex_ai_port),
        ("OpenAI", options.allow_openai, options.openai_host, options.openai_port or 0),
    ]


def warnings(options: ServerOptions) -> tuple[str, ...]:
    found = []
    if options.disable_auto_complete_config and options.strict_model_config is False:
        found.append(
            "Warning: Overriding deprecated '--strict-model-config' from False to True in favor of "
            "'--disable-auto-complete-config'!"
        )
    given = {(setting.scope, setting.key) for setting in options.trace_config}
    for (scope, key), old in _OLD_TRACE_FLAGS.items():
        value = getattr(options, f"trace_{old}")
        if (scope, key) in given and value not in ("", (), None):
            what = f"{key} value" if key in ("rate",) else key
            found.append(
                f"Warning: Overriding deprecated '--trace-{old.replace('_', '-')}' in favor of provided {what} "
                "in --trace-config!"
            )
    return tuple(found)


_OLD_TRACE_FLAGS = {
    ("triton", "file"): "file",
    ("", "level"): "level",
    ("", "rate"): "rate",
    ("", "count"): "count",
    ("triton", "log-frequency"): "log_frequency",
}
