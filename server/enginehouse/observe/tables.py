"""The tables that the server prints when it has started: options, backends, models and their state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


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
