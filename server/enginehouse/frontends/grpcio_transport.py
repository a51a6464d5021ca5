"""gRPC under the methods: grpc.aio with generic handlers that pass bytes.

Unknown methods, restricted ones, deadlines and statuses are dealt with here; nothing of grpcio goes further.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection

from enginehouse.errors import EnginehouseError, Internal, Unavailable
from enginehouse.frontends.grpc_call import GrpcCall, Method, Stream, Unary
from enginehouse.frontends.grpc_delays import GrpcDelays
from enginehouse.frontends.restricted_apis import RESTRICTED_PREFIX, Api, RestrictedApis
from enginehouse.frontends.wire_errors import as_wire_error, grpc_status
from enginehouse.options import CompressionLevel, ServerOptions

_STATUS = {status.value[0]: status for status in grpc.StatusCode}
_COMPRESSION_LEVELS = {
    CompressionLevel.NONE: 0, CompressionLevel.LOW: 1, CompressionLevel.MEDIUM: 2, CompressionLevel.HIGH: 3,
}  # fmt: skip
# grpcio's published types lack these or make them generic where the library doesn't.
_aio: Any = grpc.aio
_GenericRpcHandler: Any = grpc.GenericRpcHandler
_logger = logging.getLogger(__name__)


class GrpcioServer:
    """Listens on one address and gives every call to its method."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        options: ServerOptions,
        services: tuple[str, ...] = (),
        pool: DescriptorPool | None = None,
    ) -> None:
        """`services` are named by reflection, which finds their messages in `pool`."""
        self._handlers = _Handlers(methods, RestrictedApis(options.grpc_restricted_protocol, RESTRICTED_PREFIX))
        self._options = options
        self._services = services
        self._pool = pool
        self._server: grpc.aio.Server | None = None
        self.port = options.grpc_port

    async def start(self) -> None:
        """Raises Unavailable if the address is taken, InvalidArgument for certificates that are none."""
        options = self._options
        server = grpc.aio.server(options=_channel_options(options))
        server.add_generic_rpc_handlers((self._handlers,))
        if self._services:
            reflection.enable_server_reflection(self._services, server, self._pool)
        target = f"{options.grpc_address}:{options.grpc_port}"
        credentials = _credentials(options)
        try:
            if credentials is None:
                self.port = server.add_insecure_port(target)
            else:
                self.port = server.add_secure_port(target, credentials)
        except RuntimeError as error:
            raise Unavailable(
                f"failed to start GRPC service: Unavailable - Socket '{target}' already in use ({error})"
            ) from None
        await server.start()
        self._server = server
        _logger.info("Started GRPCInferenceService at %s:%s", options.grpc_address, self.port)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Takes no new calls, lets those in flight end, then cancels them."""
        if self._server is not None:
            await self._server.stop(grace_s)


def _channel_options(options: ServerOptions) -> list[tuple[str, int]]:
    chosen = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", int(options.reuse_grpc_port)),
        ("grpc.keepalive_time_ms", options.grpc_keepalive_time),
        ("grpc.keepalive_timeout_ms", options.grpc_keepalive_timeout),
        ("grpc.keepalive_permit_without_calls", int(options.grpc_keepalive_permit_without_calls)),
        ("grpc.http2.max_pings_without_data", options.grpc_http2_max_pings_without_data),
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            options.grpc_http2_min_recv_ping_interval_without_data,
        ),
        ("grpc.http2.max_ping_strikes", options.grpc_http2_max_ping_strikes),
    ]
    if options.grpc_max_connection_age:
        chosen.append(("grpc.max_connection_age_ms", options.grpc_max_connection_age))
    if options.grpc_max_connection_age_grace:
        chosen.append(("grpc.max_connection_age_grace_ms", options.grpc_max_connection_age_grace))
    level = _COMPRESSION_LEVELS[options.grpc_infer_response_compression_level]
    if level:
        chosen.append(("grpc.default_compression_level", level))
    return chosen


def _credentials(options: ServerOptions) -> grpc.ServerCredentials | None:
    if not (options.grpc_use_ssl or options.grpc_use_ssl_mutual):
        return None

    def read(path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise Internal(f"can't read '{path}' for gRPC over TLS: {error.strerror}") from None

    root = read(options.grpc_root_cert) if options.grpc_root_cert else None
    pair = (read(options.grpc_server_key), read(options.grpc_server_cert))
    return grpc.ssl_server_credentials([pair], root, options.grpc_use_ssl_mutual)


class _Handlers(_GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, methods: Mapping[str, Method], restricted: RestrictedApis) -> None:
        self._restricted = restricted
        self._delays = GrpcDelays.from_environment()
        self._by_path = {path: self._handler_of(method) for path, method in methods.items()}
        self._unknown = grpc.stream_stream_rpc_method_handler(_refuse_unknown)

    def service(self, details: grpc.HandlerCallDetails) -> Any | None:
        handler = self._by_path.get(details.method)
        if handler is not None:
            return handler
        # Reflection is served by its own handler, asked next.
        return None if details.method.startswith("/grpc.reflection.") else self._unknown

    def _handler_of(self, method: Method) -> Any:
        delays = self._delays if method.api is Api.INFERENCE else None
        if method.unary is not None:
            unary = delays.unary(method.unary) if delays else method.unary
            return grpc.unary_unary_rpc_method_handler(self._unary(method, unary))
        assert method.stream is not None
        stream = delays.stream(method.stream) if delays else method.stream
        return grpc.stream_stream_rpc_method_handler(self._stream(method, stream))

    def _unary(self, method: Method, function: Unary) -> Callable[[bytes, Any], Any]:
        async def handle(data: bytes, context: Any) -> bytes:
            call = _call(context)
            try:
                self._check(method, call)
                return await function(data, call)
            except Exception as error:
                await _abort(context, error)
                raise

        return handle

    def _stream(self, method: Method, function: Stream) -> Callable[[AsyncIterator[bytes], Any], Any]:
        async def handle(requests: AsyncIterator[bytes], context: Any) -> None:
            call = _call(context)

            async def read() -> bytes | None:
                data = await context.read()
                return None if data is _aio.EOF else data

            try:
                self._check(method, call)
                await function(read, context.write, call)
            except Exception as error:
                await _abort(context, error)

        return handle

    def _check(self, method: Method, call: GrpcCall) -> None:
        if method.api is not None and self._restricted:
            header = self._restricted.missing_header(method.api, call.header)
            if header is not None:
                raise Unavailable(f"This protocol is restricted, expecting header '{header}'")


def _call(context: Any) -> GrpcCall:
    now_ns = time.monotonic_ns()
    left_s = context.time_remaining()
    deadline_ns = 0 if left_s is None or left_s > 1e9 else now_ns + int(left_s * 1e9)
    return GrpcCall(context.invocation_metadata() or (), deadline_ns, now_ns)


async def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, _aio.AbortError):
        raise error
    if not isinstance(error, EnginehouseError):
        _logger.error("gRPC method failed", exc_info=error)
    told = as_wire_error(error)
    # Messages may quote bytes of the client's that are no text.
    details = str(told).encode("utf-8", "replace").decode()
    await context.abort(_STATUS[grpc_status(told)], details)


async def _refuse_unknown(requests: AsyncIterator[bytes], context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
