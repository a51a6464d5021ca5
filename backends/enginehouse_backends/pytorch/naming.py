"""Which argument each input of a config is, and which result each output. Pure.

Triton's conventions, in this order: the names of the arguments (or the keys of a dict); `ANYTHING__<index>`;
the order in the config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from enginehouse.errors import InvalidArgument

_INDEXED = re.compile(r".+__(\d+)$")


def indices_of(names: Sequence[str]) -> list[int] | None:
    """The numbers of `NAME__<number>`; None unless all names are of that form."""
    matches = [_INDEXED.match(name) for name in names]
    return [int(match[1]) for match in matches if match] if names and all(matches) else None


def bind_inputs(model: str, file: str, names: Sequence[str], arguments: Sequence[str]) -> dict[str, str]:
    """Argument by input name. Raises InvalidArgument, naming the arguments, where it can't be."""
    if all(name in arguments for name in names):
        return {name: name for name in names}
    positions = indices_of(names) or list(range(len(names)))
    if max(positions) >= len(arguments):
        raise InvalidArgument(
            f"model '{model}': the config's inputs {', '.join(names)} don't fit {file}, which takes "
            f"{len(arguments)} arguments: {', '.join(arguments)}"
        )
    return {name: arguments[position] for name, position in zip(names, positions, strict=True)}


class OutputPicker:
    """Finds the config's outputs in what a model returned, however that is nested."""

    def __init__(self, model: str, names: Sequence[str]) -> None:
        self._model = model
        self._names = names
        self._positions = indices_of(names) or list(range(len(names)))

    def pick(self, result: Any, is_leaf: Callable[[Any], bool], wanted: Sequence[str]) -> dict[str, Any]:
        """The wanted outputs (all if there are none), in the config's order."""
        leaves = flatten(result, is_leaf)
        by_key = {key: leaf for key, leaf in leaves if key}
        picked: dict[str, Any] = {}
        for name, position in zip(self._names, self._positions, strict=True):
            if wanted and name not in wanted:
                continue
            if name in by_key:
                picked[name] = by_key[name]
            elif position < len(leaves):
                picked[name] = leaves[position][1]
            else:
                keys = ", ".join(by_key) or "no names"
                raise InvalidArgument(
                    f"model '{self._model}' returned {len(leaves)} tensors ({keys}), the config's output "
                    f"'{name}' is none of them"
                )
        return picked


def flatten(result: Any, is_leaf: Callable[[Any], bool], key: str = "") -> list[tuple[str, Any]]:
    """Leaves in order, each with the key or attribute that leads to it ("" where only a position does)."""
    if is_leaf(result):
        return [(key, result)]
    if hasattr(result, "items"):
        return [leaf for name, value in result.items() for leaf in flatten(value, is_leaf, str(name))]
    if hasattr(result, "_fields"):  # a named tuple
        named = zip(result._fields, result, strict=True)
        return [leaf for name, value in named for leaf in flatten(value, is_leaf, name)]
    if isinstance(result, (tuple, list)):
        return [leaf for value in result for leaf in flatten(value, is_leaf)]
    return []
