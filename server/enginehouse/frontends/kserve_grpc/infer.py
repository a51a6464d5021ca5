"""ModelInfer: from the message's bytes to the answer's."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Any

from google.protobuf.message import DecodeError, Message

from enginehouse.core import Core, ServedVersion
from enginehouse.errors import Internal, Unsupported
from enginehouse.frontends.grpc_call import GrpcCall
from enginehouse.frontends.inference import Exchange
from enginehouse.frontends.kserve_grpc.incoming import Incoming, read_request
from enginehouse.frontends.kserve_grpc.infer_codec import decode_request, encode_response
from enginehouse.frontends.output_options import OutputOption, OutputOptions
from enginehouse.frontends.pending import Pending
from enginehouse.frontends.request_parameters import HeaderForwarding
from enginehouse.frontends.request_traces import RequestTraces
from enginehouse.frontends.shared_memory.regions import Regions
from enginehouse.frontends.tenants import TenantHeader
from enginehouse.types import InferRequest, InferResponse


def parse(kind: type[Any], data: bytes) -> Any:
    """The message. Raises Internal, as clients of Triton see it, for bytes that are none."""
    try:
        message: Message = kind.FromString(data)
    except DecodeError:
        raise Internal("Unable to parse request") from None
    return message


class InferDecoder:
    """What ModelInfer and ModelStreamInfer do alike before the core."""

    def __init__(self, core: Core, regions: Regions, forwarding: HeaderForwarding, tenants: TenantHeader) -> None:
        self._core = core
        self._regions = regions
        self._forwarding = forwarding
        self._tenants = tenants
        self.traces = RequestTraces(core, "GRPC")

    def request_of(self, incoming: Incoming, options: OutputOptions, call: GrpcCall) -> tuple[InferRequest, bool]:
        """The request, and whether the client wants empty final answers."""
        request = InferRequest(incoming.model_name, incoming.model_version)
        request.times.received_ns = call.received_ns or time.monotonic_ns()
        request.tenant = self._tenants.tenant(call.header)
        request.deadline_ns = call.deadline_ns
        options.default = OutputOption(binary=True)
        empty_final = decode_request(incoming, request, options, self._regions)
        if self._forwarding.is_on:
            self._forwarding.apply(request, call.metadata)
        if self.traces.is_on:
            self.traces.begin(request, call.metadata)
        return request, empty_final


class InferMethod:
    def __init__(self, core: Core, decoder: InferDecoder) -> None:
        self._core = core
        self._decoder = decoder

    def infer(self, data: bytes, call: GrpcCall) -> Awaitable[bytes]:
        incoming = read_request(data)
        served = self._core.model_now(incoming.model_name, incoming.model_version)
        if served is None:
            return self._wait(incoming, call)
        return self._exchange(incoming, served, call)

    async def _wait(self, incoming: Incoming, call: GrpcCall) -> bytes:
        served = await self._core.loaded_model(incoming.model_name, incoming.model_version)
        return await self._exchange(incoming, served, call)

    def _exchange(self, incoming: Incoming, served: ServedVersion, call: GrpcCall) -> Pending[bytes]:
        if served.decoupled:
            raise Unsupported("ModelInfer RPC doesn't support models with decoupled transaction policy")
        options = OutputOptions()
        try:
            request, _ = self._decoder.request_of(incoming, options, call)
        except BaseException:
            options.release()
            raise
        exchange = _Exchange(request, options, served, self._decoder.traces)
        try:
            exchange.submit(self._core)
        except Exception as error:
            exchange.refuse(error)
        return exchange


class _Exchange(Exchange[bytes]):
    __slots__ = ()

    def encode(self, response: InferResponse) -> bytes:
        answer = encode_response(response, self.options, self.served)
        if self.request.trace is not None and (sent := self._traces.sending(self.request)) is not None:
            sent()
        return answer

    def failed(self, error: Exception) -> Exception:
        self._traces.abandon(self.request)
        return error
