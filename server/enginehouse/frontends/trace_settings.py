"""Which model a trace setting is for, on either protocol."""

from __future__ import annotations

from enginehouse.core import Core
from enginehouse.errors import InvalidArgument


def known_model(core: Core, name: str) -> str:
    """The name. Raises InvalidArgument for a model that the repository doesn't have."""
    if name and not any(entry.name == name for entry in core.index()):
        raise InvalidArgument(f"Request for unknown model : {name}")
    return name
