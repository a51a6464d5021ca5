"""Which groups of calls need a secret header, on either protocol. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

from enginehouse.option_values import RestrictedGroup

RESTRICTED_PREFIX = "triton-grpc-protocol-"
"""Before the key of a restricted protocol, in gRPC's metadata."""


class Api(StrEnum):
    HEALTH = "health"
    METADATA = "metadata"
    INFERENCE = "inference"
    SHARED_MEMORY = "shared-memory"
    MODEL_CONFIG = "model-config"
    MODEL_REPOSITORY = "model-repository"
    STATISTICS = "statistics"
    TRACE = "trace"
    LOGGING = "logging"


class RestrictedApis:
    """`prefix` stands before the key in the header's name."""

    def __init__(self, groups: Iterable[RestrictedGroup], prefix: str = "") -> None:
        self._secrets = {Api(api): (prefix + group.key, group.value) for group in groups for api in group.apis}

    def missing_header(self, api: Api, header: Callable[[str], str | None]) -> str | None:
        """The header that this call lacks, or None if it may pass."""
        secret = self._secrets.get(api)
        if secret is None:
            return None
        name, value = secret
        return None if header(name.lower()) == value else name

    def __bool__(self) -> bool:
        return bool(self._secrets)
