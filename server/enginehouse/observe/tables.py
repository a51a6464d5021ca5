"""The tables that the server prints when it has started: agents, backends, models and their state, options."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from enginehouse.options import ModelControlMode, RateLimitMode, ServerOptions


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A frame of `+---+` around left-aligned columns; cells of several lines stay in their column."""
    cells = [[str(cell).split("\n") for cell in row] for row in ([*headers], *rows)]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(len(headers))]
    border = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    lines = [border]
    for index, row in enumerate(cells):
        for line in range(max(len(cell) for cell in row)):
            texts = (cell[line] if line < len(cell) else "" for cell in row)
            padded = (f" {text:<{width}} " for text, width in zip(texts, widths, strict=True))
            lines.append("|" + "|".join(padded) + "|")
        if index == 0:
            lines.append(border)
    return "\n".join([*lines, border])


def models_table(models: Iterable[tuple[str, str, str, str]]) -> str:
    """From (name, version, state, reason): READY, or the state with its reason."""
    rows = [
        (
            name,
            version or "-",
            state if not reason or state == "READY" else f"{state or 'Not loaded'}: {reason}",
        )
        for name, version, state, reason in models
    ]
    return table(("Model", "Version", "Status"), rows)


def options_table(values: Mapping[str, object]) -> str:
    """Sequences take a row an item: `model_repository_path[0]`. Truth is 1 or 0."""
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, list | tuple):
            rows += [(f"{name}[{index}]", item) for index, item in enumerate(value)]
        else:
            rows.append((name, int(value) if isinstance(value, bool) else value))
    return table(("Option", "Value"), rows)


def backends_table(backends: Mapping[str, str], options: ServerOptions) -> str:
    """From name to where it is; with what --backend-config says of it."""
    given = options.backend_options
    rows = [
        (name, place, json.dumps({"cmdline": {**given.get("", {}), **given.get(name, {})}}))
        for name, place in sorted(backends.items())
    ]
    return table(("Backend", "Path", "Config"), rows)


def agents_table(agents: Mapping[str, str]) -> str:
    return table(("Repository Agent", "Path"), sorted(agents.items()))


def server_table(options: ServerOptions, version: str, extensions: Sequence[str]) -> str:
    """What the server runs with, under Triton's names."""
    limits = {RateLimitMode.OFF: "OFF", RateLimitMode.EXECUTION_COUNT: "EXEC_COUNT"}
    values: dict[str, object] = {
        "server_id": options.id,
        "server_version": version,
        "server_extensions": " ".join(extensions),
        "model_repository_path": list(options.model_repository),
        "model_control_mode": f"MODE_{options.model_control_mode.name}",
    }
    if options.model_control_mode is ModelControlMode.EXPLICIT:
        values |= {f"startup_models_{index}": name for index, name in enumerate(options.load_model)}
    values |= {
        "strict_model_config": not options.complete_configs,
        "model_config_name": options.model_config_name,
        "rate_limit": limits[options.rate_limit],
        "pinned_memory_pool_byte_size": options.pinned_memory_pool_byte_size,
        "min_supported_compute_capability": options.min_supported_compute_capability,
        "strict_readiness": options.strict_readiness,
        "exit_timeout": options.exit_timeout_secs,
        "cache_enabled": bool(options.caches),
        "memory_limit": [_limit(each.device, each.num_bytes, each.fraction) for each in options.memory_limit],
    }
    return options_table(values)


def _limit(device: str, num_bytes: int, fraction: float) -> str:
    return f"{device}={f'{fraction:.0%}' if fraction else num_bytes}"
