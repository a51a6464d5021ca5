"""What the interface of `triton_python_backend_utils` knows of the model that this process runs.

One process runs one instance of one model, so it is a module's state, as it is in Triton's stub.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from enginehouse.backend import Services


@dataclass(slots=True)
class RunningModel:
    """Set by the backend before model.py is imported."""

    name: str = ""
    instance_name: str = ""
    directory: str = ""
    """With the version."""
    decoupled: bool = False
    output_names: list[str] = field(default_factory=list)
    services: Services | None = None
    is_executing_allowed: bool = False
    """False in `initialize` and `finalize`, where BLS is refused."""


running = RunningModel()


def services_or_none() -> Services | None:
    return running.services
