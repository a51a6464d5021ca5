"""ModelStreamInfer: requests of any model over one stream, each answered any number of times.

Answers of models with one answer keep the order of their requests; those of decoupled models come as they
are made. Errors are messages in the stream and don't end it, unless the client asked for that.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from enginehouse.config.schema import ModelInferResponse, ModelStreamInferResponse
from enginehouse.core import Core, ServedVersion
from enginehouse.errors import EnginehouseError
from enginehouse.frontends.grpc_call import GrpcCall, Read, Write
from enginehouse.frontends.kserve_grpc.incoming import read_request
from enginehouse.frontends.kserve_grpc.infer import InferDecoder
from enginehouse.frontends.kserve_grpc.infer_codec import encode_varint, response_parts
from enginehouse.frontends.output_options import OutputOptions
from enginehouse.frontends.request_parameters import FINAL
from enginehouse.frontends.wire_errors import as_wire_error
from enginehouse.types import InferRequest, InferResponse

_INFER_RESPONSE_TAG = b"\x12"  # infer_response: field 2, length-delimited
GRPC_ERROR_HEADER = "triton_grpc_error"
GRPC_ERROR_DEFAULT = os.environ.get("TRITONSERVER_GRPC_STATUS", "false")
"""Whether an error of a model ends the stream with its status where the client doesn't say."""


@dataclass(slots=True, eq=False)
class Exchange:
    """One request of a stream and what of its answers may not be sent yet."""

    request: InferRequest | None
    options: OutputOptions
    served: ServedVersion | None = None
    empty_final: bool = False
    ended: bool = False
    held_back: list[bytes] = field(default_factory=list)

    @property
    def in_order(self) -> bool:
        return self.served is None or not self.served.decoupled


class StreamMethod:
    def __init__(self, core: Core, decoder: InferDecoder) -> None:
        self._core = core
        self._decoder = decoder

    async def stream(self, read: Read, write: Write, call: GrpcCall) -> None:
        await _Session(self._core, self._decoder, call).run(read, write)


class _Session:
    def __init__(self, core: Core, decoder: InferDecoder, call: GrpcCall) -> None:
        self._core = core
        self._decoder = decoder
        self._call = call
        self._errors_end_it = (call.header(GRPC_ERROR_HEADER) or GRPC_ERROR_DEFAULT).lower() == "true"
        self._outgoing: asyncio.Queue[bytes | EnginehouseError | None] = asyncio.Queue()
        self._open: set[Exchange] = set()
        self._ordered: deque[Exchange] = deque()
        self._all_received = False

    async def run(self, read: Read, write: Write) -> None:
        reader = asyncio.create_task(self._receive(read))
        try:
            while (item := await self._outgoing.get()) is not None:
                if isinstance(item, EnginehouseError):
                    raise item
                await write(item)
            await reader
        finally:
            reader.cancel()
            for exchange in list(self._open):
                self._abandon(exchange)
            # The session may stay in cycles until the collector comes; what nobody took must not.
            self._ordered.clear()
            while not self._outgoing.empty():
                self._outgoing.get_nowait()

    async def _receive(self, read: Read) -> None:
        try:
            while (data := await read()) is not None:
                await self._start(data)
        except Exception as error:
            self._outgoing.put_nowait(as_wire_error(error))
            return
        self._all_received = True
        self._end_if_done()

    async def _start(self, data: bytes) -> None:
        incoming = read_request(data)
        exchange = Exchange(None, OutputOptions())
        self._open.add(exchange)
        try:
            served = await self._core.loaded_model(incoming.model_name, incoming.model_version)
            exchange.served = served
            exchange.request, exchange.empty_final = self._decoder.request_of(incoming, exchange.options, self._call)
            exchange.request.sink = self._sink(exchange)
            if exchange.in_order:
                self._ordered.append(exchange)
            self._core.submit_for_client(exchange.request)
        except EnginehouseError as error:
            if exchange not in self._ordered:
                self._ordered.append(exchange)
            whose = ModelInferResponse(id=incoming.id)
            early = ModelStreamInferResponse(error_message=str(error), infer_response=whose)
            self._send(exchange, early.SerializeToString())
            self._end(exchange)

    def _sink(self, exchange: Exchange) -> Callable[[InferResponse], None]:
        return lambda response: self._answer(exchange, response)

    def _answer(self, exchange: Exchange, response: InferResponse) -> None:
        if exchange not in self._open:
            return  # the client has gone
        if response.error is not None and self._errors_end_it:
            self._outgoing.put_nowait(response.error)
        elif response.error is not None:
            self._send(exchange, _error_message(exchange, response, response.error))
        elif response.has_response:
            self._send(exchange, _answer_message(exchange, response))
        elif exchange.empty_final:
            self._send(exchange, _flag_message(exchange, response).SerializeToString())
        if response.final:
            if exchange.request is not None and (sent := self._decoder.traces.sending(exchange.request)):
                sent()
            self._end(exchange)

    def _send(self, exchange: Exchange, data: bytes) -> None:
        if exchange.in_order and self._ordered and self._ordered[0] is not exchange:
            exchange.held_back.append(data)
        else:
            self._outgoing.put_nowait(data)

    def _end(self, exchange: Exchange) -> None:
        exchange.ended = True
        exchange.options.release()
        self._open.discard(exchange)
        while self._ordered and self._ordered[0].ended:
            self._ordered.popleft()
            if self._ordered:
                for data in self._ordered[0].held_back:
                    self._outgoing.put_nowait(data)
                self._ordered[0].held_back.clear()
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._all_received and not self._open:
            self._outgoing.put_nowait(None)

    def _abandon(self, exchange: Exchange) -> None:
        self._open.discard(exchange)
        exchange.options.release()
        if exchange.request is not None:
            exchange.request.cancel()


def _answer_message(exchange: Exchange, response: InferResponse) -> bytes:
    assert exchange.served is not None
    parameters = {**response.parameters, FINAL: response.final}
    try:
        parts = response_parts(response, exchange.options, exchange.served, parameters)
    except EnginehouseError as error:
        return _error_message(exchange, response, error)
    length = sum(memoryview(part).nbytes for part in parts)
    return b"".join((_INFER_RESPONSE_TAG, encode_varint(length), *parts))


def _flag_message(exchange: Exchange, response: InferResponse) -> ModelStreamInferResponse:
    """An answer without outputs: whose it is and whether it is the last."""
    assert exchange.request is not None
    inner = ModelInferResponse(model_name=exchange.request.model_name, id=exchange.request.id)
    inner.parameters[FINAL].bool_param = response.final
    return ModelStreamInferResponse(infer_response=inner)


def _error_message(exchange: Exchange, response: InferResponse, error: EnginehouseError) -> bytes:
    message = _flag_message(exchange, response)
    message.error_message = str(error)
    return message.SerializeToString()
