"""Who asks: the header or metadata that names a request's tenant.

It wins over what the body says (the parameter `tenant`, OpenAI's `user`), so that a gateway which sets it can't be
talked out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TenantHeader:
    """`name` in lower case; "" for none."""

    name: str

    @classmethod
    def of(cls, option: str) -> TenantHeader:
        return cls(option.strip().lower())

    def tenant(self, header: Callable[[str], str | None]) -> str:
        """"" if it isn't there."""
        return (header(self.name) or "") if self.name else ""
