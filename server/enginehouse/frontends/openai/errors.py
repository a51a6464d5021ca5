"""Errors as clients of the OpenAI API read them."""

from __future__ import annotations

import orjson

from enginehouse.errors import EnginehouseError, ErrorCode, InvalidArgument
from enginehouse.frontends.http_message import JSON, HttpRequest, HttpResponse
from enginehouse.frontends.wire_errors import http_status

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "invalid_request_error",
    503: "service_unavailable_error",
}
# A request that can't be served here is the client's to change, as that API sees it.
_STATUS = {ErrorCode.UNSUPPORTED: 400}


class BadField(InvalidArgument):
    """`param` is the field of the request that is wrong."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


def status_of(error: EnginehouseError) -> int:
    return _STATUS.get(error.code) or http_status(error)


def error_document(error: EnginehouseError) -> dict[str, object]:
    status = status_of(error)
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(status, "server_error"),
            "param": getattr(error, "param", None),
            "code": status,
        }
    }


def error_reply(error: EnginehouseError) -> HttpResponse:
    return HttpResponse(status_of(error), JSON, (orjson.dumps(error_document(error)),))


def named_error(status: int, code: str, message: str) -> HttpResponse:
    """With a code that is a word, as some refusals have it."""
    document = {"error": {"message": message, "type": _TYPES[status], "param": None, "code": code}}
    return HttpResponse(status, JSON, (orjson.dumps(document),))


def refuse_length(request: HttpRequest) -> HttpResponse | None:
    """What this API says of a Content-Length that is no number of bytes; None on others' paths."""
    if not request.path.startswith("/v1/"):
        return None
    value = request.headers.get("content-length") or ""
    wrong = "must be non-negative" if value.removeprefix("-").isdigit() else "is not an integer"
    return named_error(400, "invalid_content_length", f"Content-Length '{value}' {wrong}")
