"""From a path to the handler: the table of routes and what stands before every handler.

Order of the checks as clients of Triton see it: unknown path 404, restricted 403, wrong method 405.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from enginehouse.errors import EnginehouseError
from enginehouse.frontends.http_message import (
    JSON,
    NOT_FOUND,
    TEXT,
    HttpRequest,
    HttpResponse,
    Reply,
    error_body,
    error_response,
    method_not_allowed,
)
from enginehouse.frontends.pending import Pending
from enginehouse.frontends.restricted_apis import Api, RestrictedApis
from enginehouse.frontends.wire_errors import as_wire_error

logger = logging.getLogger(__name__)

PathParts: TypeAlias = Mapping[str, str]
RouteHandler: TypeAlias = Callable[[HttpRequest, PathParts], Awaitable[Reply]]
FastHandler: TypeAlias = Callable[[HttpRequest, PathParts], Pending[HttpResponse] | None]

_MAX_CACHED_PATHS = 4096


@dataclass(frozen=True, slots=True)
class Route:
    """`pattern` matches the whole path; its named groups are the handler's parts, "" if absent.

    `error_type` is the content type of 405 and of errors that the handler doesn't turn into answers itself.
    """

    pattern: str
    methods: Sequence[str]
    api: Api | None
    handler: RouteHandler
    error_type: str = JSON
    not_allowed_type: str = JSON
    fast: FastHandler | None = None
    """Tried before `handler`: answers without a task, or says None where it would have to wait. Never raises."""


Found: TypeAlias = tuple[Route, PathParts]


class Router:
    """Finds the route of a path; remembers the paths that were asked for."""

    def __init__(self, routes: Iterable[Route], restricted: RestrictedApis) -> None:
        self._routes = [(re.compile(route.pattern), route) for route in routes]
        self._restricted = restricted
        self._known: dict[str, Found] = {}

    def find(self, path: str) -> Found | None:
        found = self._known.get(path)
        if found is None:
            found = self._search(path)
            if found is not None:
                if len(self._known) >= _MAX_CACHED_PATHS:
                    self._known.clear()
                self._known[path] = found
        return found

    def _search(self, path: str) -> Found | None:
        for pattern, route in self._routes:
            match = pattern.fullmatch(path)
            if match is not None:
                return route, match.groupdict(default="")
        return None

    def handle(self, request: HttpRequest) -> Awaitable[Reply]:
        """The answer, whatever happens in a handler."""
        found = self._known.get(request.path)
        if found is not None and self._may_be_fast:
            route, parts = found
            if route.fast is not None and request.method in route.methods:
                pending = route.fast(request, parts)
                if pending is not None:
                    return pending
        return self._handle(request)

    @property
    def _may_be_fast(self) -> bool:
        return not self._restricted and not logger.isEnabledFor(logging.DEBUG)

    async def _handle(self, request: HttpRequest) -> Reply:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("HTTP request: %s %s", request.method, request.path)
        found = self.find(request.path)
        if found is None:
            return NOT_FOUND
        route, parts = found
        if route.api is not None and self._restricted:
            header = self._restricted.missing_header(route.api, request.headers.get)
            if header is not None:
                text = f"This API is restricted, expecting header '{header}'"
                return HttpResponse(403, TEXT, (error_body(text),))
        if request.method not in route.methods:
            return method_not_allowed(route.not_allowed_type)
        try:
            return await route.handler(request, parts)
        except EnginehouseError as error:
            return error_response(error, route.error_type)
        except Exception as error:
            return error_response(as_wire_error(error), route.error_type)
