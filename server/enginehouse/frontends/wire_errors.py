"""The one table from error codes to HTTP statuses and gRPC status codes.

Everything that is an error on a wire goes through here. Statuses of codes that Triton has are Triton's.
"""

from __future__ import annotations

from enginehouse.errors import EnginehouseError, ErrorCode, Internal

HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.UNKNOWN: 400,
    ErrorCode.INTERNAL: 500,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.INVALID_ARGUMENT: 400,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.UNSUPPORTED: 501,
    ErrorCode.ALREADY_EXISTS: 400,
    ErrorCode.CANCELLED: 400,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.PERMISSION_DENIED: 403,
    ErrorCode.RESOURCE_EXHAUSTED: 429,
    ErrorCode.DEADLINE_EXCEEDED: 504,
}

GRPC_STATUS: dict[ErrorCode, int] = {
    ErrorCode.CANCELLED: 1,
    ErrorCode.UNKNOWN: 2,
    ErrorCode.INVALID_ARGUMENT: 3,
    ErrorCode.DEADLINE_EXCEEDED: 4,
    ErrorCode.NOT_FOUND: 5,
    ErrorCode.ALREADY_EXISTS: 6,
    ErrorCode.PERMISSION_DENIED: 7,
    ErrorCode.RESOURCE_EXHAUSTED: 8,
    ErrorCode.UNSUPPORTED: 12,
    ErrorCode.INTERNAL: 13,
    ErrorCode.UNAVAILABLE: 14,
    ErrorCode.UNAUTHENTICATED: 16,
}


def http_status(error: EnginehouseError) -> int:
    return HTTP_STATUS[error.code]


def grpc_status(error: EnginehouseError) -> int:
    return GRPC_STATUS[error.code]


def as_wire_error(error: BaseException) -> EnginehouseError:
    """What a client is told about any exception: our own say it themselves, others are internal."""
    if isinstance(error, EnginehouseError):
        return error
    return Internal(f"unexpected {type(error).__name__}: {error}")
