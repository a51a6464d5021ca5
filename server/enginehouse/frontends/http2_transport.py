"""gRPC under the methods: our own, on HTTP/2 over asyncio, for a tenth of grpcio's cost a call.

The wire: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md. grpcio's asyncio server was tried for what
this one didn't do at first: a path that is no UTF-8 ends it for everybody (1.85).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
import time
from collections.abc import Awaitable, Mapping

from enginehouse.frontends.access import MISSING_KEY, OPEN_METHODS, Keys
from enginehouse.frontends.grpc_call import GrpcCall, Method
from enginehouse.frontends.grpc_delays import GrpcDelays
from enginehouse.frontends.http2_call import DEADLINE_EXCEEDED, UNAUTHENTICATED, UNIMPLEMENTED, Call
from enginehouse.frontends.http2_connection import Headers, Http2Connection
from enginehouse.frontends.http2_frames import literal_header
from enginehouse.frontends.http2_keeping import KeepAlive
from enginehouse.frontends.http2_stream import Stream, StreamHandler
from enginehouse.frontends.listening import Certificates, listen, port_of, socket_name
from enginehouse.frontends.restricted_apis import RESTRICTED_PREFIX, Api, RestrictedApis
from enginehouse.options import CompressionLevel, ServerOptions

_UNIT_NS = {b"H": 3600 * 10**9, b"M": 60 * 10**9, b"S": 10**9, b"m": 10**6, b"u": 10**3, b"n": 1}
_GZIP_LEVELS = {
    CompressionLevel.NONE: 0, CompressionLevel.LOW: 1, CompressionLevel.MEDIUM: 6, CompressionLevel.HIGH: 9,
}  # fmt: skip
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_NOT_METADATA = frozenset(
    (b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding", b"host", b"connection")
)
_logger = logging.getLogger(__name__)


class Http2GrpcServer:
    """Listens on one address and gives every call to its method."""

    def __init__(self, methods: Mapping[str, Method], options: ServerOptions) -> None:
        restricted = RestrictedApis(options.grpc_restricted_protocol, RESTRICTED_PREFIX)
        gzip_level = _GZIP_LEVELS[options.grpc_infer_response_compression_level]
        self._calls = _Calls(methods, restricted, Keys(options.api_key), gzip_level)
        self._keep_alive = KeepAlive.of(options)
        self._options = options
        self._listener: asyncio.Server | None = None
        self._connections: set[Http2Connection] = set()
        self._all_gone: asyncio.Future[None] | None = None
        self.port = options.grpc_port

    async def start(self) -> None:
        """Raises Unavailable if the address is taken, InvalidArgument for certificates that are none."""
        loop = asyncio.get_running_loop()
        options = self._options
        certificates = _certificates(options)
        tls = None if certificates is None else certificates.context("h2")

        def connect() -> Http2Connection:
            connection = Http2Connection(self._calls.open, self._forget, loop, self._keep_alive)
            self._connections.add(connection)
            return connection

        self._listener = await listen(
            connect, "GRPC", options.grpc_address, options.grpc_port, reuse_port=options.reuse_grpc_port, tls=tls
        )
        self.port = port_of(self._listener, options.grpc_port)
        _logger.info("Started GRPCInferenceService at %s", socket_name(options.grpc_address, self.port))

    async def stop(self, grace_s: float = 5.0) -> None:
        """Takes no new calls, lets those in flight end, then cancels them."""
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.stop()
        if self._connections:  # each closes when its last call has ended and is on its way
            self._all_gone = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._all_gone], timeout=grace_s)
        for connection in list(self._connections):
            connection.abort()

    def _forget(self, connection: Http2Connection) -> None:
        self._connections.discard(connection)
        if self._all_gone is not None and not self._connections and not self._all_gone.done():
            self._all_gone.set_result(None)


def _certificates(options: ServerOptions) -> Certificates | None:
    """Mutual TLS implies TLS; a root certificate without it is not asked for, as in Triton."""
    if not options.grpc_use_ssl:
        return None
    root = options.grpc_root_cert if options.grpc_use_ssl_mutual else ""
    return Certificates(options.grpc_server_cert, options.grpc_server_key, root)


class _Calls:
    """From a stream's headers to the method that it calls."""

    def __init__(
        self, methods: Mapping[str, Method], restricted: RestrictedApis, keys: Keys, gzip_level: int
    ) -> None:
        self._keys = keys
        self._gzip_level = gzip_level
        delays = GrpcDelays.from_environment()
        self._methods = {path.encode(): _delayed(method, delays) for path, method in methods.items()}
        self._restricted = restricted
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, stream: Stream, headers: Headers, ends: bool) -> StreamHandler:
        now_ns = time.monotonic_ns()
        path = content_type = encoding = accepted = b""
        deadline_ns = 0
        metadata: list[tuple[str, str]] = []
        for name, value in headers:
            if name == b":path":
                path = value
            elif name == b"content-type":
                content_type = value
            elif name == b"grpc-timeout":
                deadline_ns = _deadline_ns(value, now_ns)
            elif name == b"grpc-encoding":
                encoding = value
            elif name == b"grpc-accept-encoding":
                accepted = value
            elif name[:1] != b":" and name not in _NOT_METADATA:
                metadata.append((name.decode("latin-1"), _metadata_value(name, value)))
        call = Call(self.start, stream, GrpcCall(metadata, deadline_ns, now_ns), encoding)
        if not content_type.startswith(b"application/grpc"):
            stream.send_headers(literal_header(b":status", b"415"), end=True)
            call.closed = True
            return call
        method = self._methods.get(path)
        if method is None:
            call.refuse(UNIMPLEMENTED, "")
        elif encoding not in (b"", b"identity", b"gzip", b"deflate"):
            call.refuse(UNIMPLEMENTED, f"Compression algorithm '{encoding.decode('latin-1')}' is not supported")
        elif self._keys and not self._admits(path, call):
            call.refuse(UNAUTHENTICATED, MISSING_KEY)
        elif deadline_ns and deadline_ns <= now_ns:
            call.refuse(DEADLINE_EXCEEDED, "Deadline Exceeded")
        else:
            if self._gzip_level and method.api is Api.INFERENCE and b"gzip" in accepted:
                call.gzip_level = self._gzip_level
            call.begin(method, self._missing_header(method, call))
        return call

    def _admits(self, path: bytes, call: Call) -> bool:
        return self._keys.admit(call.grpc.header("authorization")) or bool(OPEN_METHODS.fullmatch(path.decode()))

    def _missing_header(self, method: Method, call: Call) -> str | None:
        if method.api is None or not self._restricted:
            return None
        return self._restricted.missing_header(method.api, call.grpc.header)

    def start(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _delayed(method: Method, delays: GrpcDelays) -> Method:
    if not delays or method.api is not Api.INFERENCE:
        return method
    if method.unary is not None:
        return Method(method.api, delays.unary(method.unary))
    assert method.stream is not None, "a method has one of the two"
    return Method(method.api, stream=delays.stream(method.stream))


def _deadline_ns(value: bytes, now_ns: int) -> int:
    """0, which is none, for what is no timeout."""
    found = _TIMEOUT.fullmatch(value)
    return now_ns + int(found[1]) * _UNIT_NS[found[2]] if found else 0


def _metadata_value(name: bytes, value: bytes) -> str:
    if not name.endswith(b"-bin"):
        return value.decode("latin-1")
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4)).decode("latin-1")
    except (binascii.Error, ValueError):
        return value.decode("latin-1")


