"""Every error that the server can answer, as one tree with a stable code each.

EnginehouseError
├── InvalidArgument      the request or config can't be right; sending it again won't help
├── NotFound             no such model, version, region, file
├── AlreadyExists        the name is taken
├── Unavailable          not now: queue full, deadline passed in the queue, not ready, host gone
├── Unsupported          right, but this server or model doesn't do it
├── Cancelled            the client went away or the deadline passed
├── Internal             our fault or the model's
├── Unknown              nobody said why
├── Unauthenticated · PermissionDenied · ResourceExhausted · DeadlineExceeded
                         (models may answer these; named after gRPC's codes)

No HTTP or gRPC numbers here: `frontends/wire_errors.py` maps codes to both.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """Stable names; they are those of Triton's TRITONSERVER_Error_Code where it has one."""

    UNKNOWN = "Unknown"
    INTERNAL = "Internal"
    NOT_FOUND = "Not found"
    INVALID_ARGUMENT = "Invalid argument"
    UNAVAILABLE = "Unavailable"
    UNSUPPORTED = "Unsupported"
    ALREADY_EXISTS = "Already exists"
    CANCELLED = "Cancelled"
    UNAUTHENTICATED = "Unauthenticated"
    PERMISSION_DENIED = "Permission denied"
    RESOURCE_EXHAUSTED = "Resource exhausted"
    DEADLINE_EXCEEDED = "Deadline exceeded"


class EnginehouseError(Exception):
    """Base of the tree. `str(error)` is the text that the client reads."""

    code = ErrorCode.INTERNAL

    def __init__(self, message: str, *, reason: FailureReason | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        """Set by who refuses a request that the core had accepted: the label of the failure metric."""


class FailureReason(StrEnum):
    """Values of the `reason` label of nv_inference_request_failure."""

    REJECTED = "REJECTED"
    CANCELED = "CANCELED"
    BACKEND = "BACKEND"
    OTHER = "OTHER"


class InvalidArgument(EnginehouseError):
    code = ErrorCode.INVALID_ARGUMENT


class NotFound(EnginehouseError):
    code = ErrorCode.NOT_FOUND


class AlreadyExists(EnginehouseError):
    code = ErrorCode.ALREADY_EXISTS


class Unavailable(EnginehouseError):
    code = ErrorCode.UNAVAILABLE


class Unsupported(EnginehouseError):
    code = ErrorCode.UNSUPPORTED


class Cancelled(EnginehouseError):
    code = ErrorCode.CANCELLED


class Internal(EnginehouseError):
    code = ErrorCode.INTERNAL


class Unknown(EnginehouseError):
    code = ErrorCode.UNKNOWN


class Unauthenticated(EnginehouseError):
    code = ErrorCode.UNAUTHENTICATED


class PermissionDenied(EnginehouseError):
    code = ErrorCode.PERMISSION_DENIED


class ResourceExhausted(EnginehouseError):
    code = ErrorCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(EnginehouseError):
    code = ErrorCode.DEADLINE_EXCEEDED


_CLASS_BY_CODE: dict[ErrorCode, type[EnginehouseError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument, NotFound, AlreadyExists, Unavailable, Unsupported, Cancelled, Internal, Unknown,
        Unauthenticated, PermissionDenied, ResourceExhausted, DeadlineExceeded,
    )
}  # fmt: skip


def error_of(code: ErrorCode | str, message: str, reason: FailureReason | None = None) -> EnginehouseError:
    """The error of that code: how errors come back from another process."""
    return _CLASS_BY_CODE[ErrorCode(code)](message, reason=reason)
