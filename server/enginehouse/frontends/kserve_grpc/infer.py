"""ModelInfer: from the message's bytes to the answer's."""

from __future__ import annotations

import time
from typing import Any

from google.protobuf.message import DecodeError, Message

from enginehouse.config.schema import ModelInferRequest
from enginehouse.core import Core, ServedVersion
from enginehouse.errors import Internal, Unsupported
from enginehouse.frontends.grpc_call import GrpcCall
from enginehouse.frontends.inference import infer_once
from enginehouse.frontends.kserve_grpc.infer_codec import decode_infer, encode_response
from enginehouse.frontends.output_options import OutputOption, OutputOptions
from enginehouse.frontends.request_parameters import HeaderForwarding
from enginehouse.frontends.request_traces import RequestTraces
from enginehouse.frontends.shared_memory.regions import Regions
from enginehouse.types import InferRequest


def parse(kind: type[Any], data: bytes) -> Any:
    """The message. Raises Internal, as clients of Triton see it, for bytes that are none."""
    try:
        message: Message = kind.FromString(data)
    except DecodeError:
        raise Internal("Unable to parse request") from None
    return message


class InferDecoder:
    """What ModelInfer and ModelStreamInfer do alike before the core."""

    def __init__(self, core: Core, regions: Regions, forwarding: HeaderForwarding) -> None:
        self._core = core
        self._regions = regions
        self._forwarding = forwarding
        self.traces = RequestTraces(core, "GRPC")

    def request_of(
        self, message: ModelInferRequest, options: OutputOptions, call: GrpcCall
    ) -> tuple[InferRequest, bool]:
        """The request, and whether the client wants empty final answers."""
        request = InferRequest(message.model_name, message.model_version)
        request.times.received_ns = call.received_ns or time.monotonic_ns()
        request.deadline_ns = call.deadline_ns
        options.default = OutputOption(binary=True)
        empty_final = decode_infer(message, request, options, self._regions)
        self._forwarding.apply(request, call.metadata)
        self.traces.begin(request, call.metadata)
        return request, empty_final


class InferMethod:
    def __init__(self, core: Core, decoder: InferDecoder) -> None:
        self._core = core
        self._decoder = decoder

    async def infer(self, data: bytes, call: GrpcCall) -> bytes:
        message = parse(ModelInferRequest, data)
        served = await self._core.loaded_model(message.model_name, message.model_version)
        if served.decoupled:
            raise Unsupported("ModelInfer RPC doesn't support models with decoupled transaction policy")
        options = OutputOptions()
        try:
            request, _ = self._decoder.request_of(message, options, call)
            return await self._answer(request, options, served)
        finally:
            options.release()

    async def _answer(self, request: InferRequest, options: OutputOptions, served: ServedVersion) -> bytes:
        traces = self._decoder.traces
        try:
            response = await infer_once(self._core, request)
            if response.error is not None:
                raise response.error
            answer = encode_response(response, options, served)
            if (sent := traces.sending(request)) is not None:
                sent()
            return answer
        except BaseException:
            traces.abandon(request)
            raise
