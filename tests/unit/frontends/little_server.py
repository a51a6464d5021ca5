"""A real Core over models that are Python functions, for tests of the front ends without hosts or processes.

`Functions` is a scheduler that runs a request at once and answers on the loop.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import text_format

from enginehouse.config.schema import ModelConfig, ModelStatistics
from enginehouse.core import Core
from enginehouse.errors import EnginehouseError
from enginehouse.frontends.grpc_call import GrpcCall, Method
from enginehouse.frontends.http_message import HttpRequest, HttpResponse, HttpStream, Reply
from enginehouse.frontends.http_routes import Router
from enginehouse.frontends.kserve_grpc.health import HealthMethods
from enginehouse.frontends.kserve_grpc.methods import v2_methods
from enginehouse.frontends.kserve_http.front_end import v2_router
from enginehouse.frontends.serving import make_regions
from enginehouse.observe.logs import LogSettings
from enginehouse.options import ServerOptions
from enginehouse.repository.registry import Registry, ServedVersion, VersionState
from enginehouse.request_checks import RequestChecks
from enginehouse.types import DataType, InferRequest, InferResponse, Tensor, TensorSpec

Run = Callable[[InferRequest], Iterable[InferResponse | EnginehouseError]]


def echo(request: InferRequest) -> list[InferResponse]:
    """Every input comes back, IN… as OUT…, as far as it was asked for."""
    outputs = [
        Tensor("OUT" + name.removeprefix("IN"), tensor.datatype, tensor.shape, tensor.data)
        for name, tensor in request.inputs.items()
    ]
    wanted = set(request.requested_outputs)
    return [InferResponse([tensor for tensor in outputs if not wanted or tensor.name in wanted])]


@dataclass
class Functions:
    """Answers with what `run` makes; with a gate, only when it is opened."""

    served: ServedVersion
    run: Run
    gate: asyncio.Event | None = None
    cancelled: list[InferRequest] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    num_in_flight: int = 0
    num_pending: int = 0
    num_sequences: int = 0

    def submit(self, request: InferRequest) -> None:
        self.num_in_flight += 1
        request.on_cancel = self.cancelled.append
        task = asyncio.get_running_loop().create_task(self._answer(request))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self, request: InferRequest) -> None:
        if self.gate is not None:
            await self.gate.wait()
        assert request.sink is not None
        answers = list(self.run(request))
        self.num_in_flight -= 1
        for index, answer in enumerate(answers):
            response = answer if isinstance(answer, InferResponse) else InferResponse(error=answer)
            response.final = index == len(answers) - 1
            response.model_name, response.model_version = self.served.name, str(self.served.version)
            response.id = request.id
            request.sink(response)


@dataclass
class Statistics:
    served: ServedVersion

    def message(self) -> ModelStatistics:
        message = ModelStatistics(name=self.served.name, version=str(self.served.version))
        message.inference_stats.success.count = 1
        return message

    def on_refusal(self, error: EnginehouseError) -> None:
        pass


class Source:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def names(self) -> Sequence[str]:
        return sorted(self._registry.models)


@dataclass
class LittleServer:
    core: Core
    router: Router
    methods: dict[str, Method]
    schedulers: dict[str, Functions]

    async def http(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        path, _, query = path.partition("?")
        return await self.router.handle(HttpRequest(method, path, query, Headers(headers or {}), body))

    async def grpc(self, name: str, data: bytes, metadata: Mapping[str, str] | None = None) -> bytes:
        function = self.methods["/inference.GRPCInferenceService/" + name].unary
        assert function is not None
        return await function(data, GrpcCall(tuple((metadata or {}).items())))


class Headers:
    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given
        self._lowered = {name.lower(): value for name, value in given.items()}

    def get(self, name: str) -> str | None:
        return self._lowered.get(name.lower())

    def items(self) -> Iterable[tuple[str, str]]:
        return self._given.items()


def little_server(models: Mapping[str, tuple[str, Run]], **options: Any) -> LittleServer:
    """`models`: by name, the config as pbtxt without the name, and what it does."""
    chosen = ServerOptions(**{"allow_client_shm": True, **options})
    registry = Registry()
    core = Core(registry, options=chosen, tracing=None, logs=LogSettings(), metrics=None)
    core.source = Source(registry)
    core.started = True
    schedulers = {}
    for name, (config_text, run) in models.items():
        config = text_format.Parse(config_text, ModelConfig(name=name, backend="python"))
        checks = RequestChecks(config)
        served = ServedVersion(
            name=name,
            version=1,
            config=config,
            inputs=_specs(config, config.input),
            outputs=_specs(config, config.output),
            decoupled=config.model_transaction_policy.decoupled,
            checks=checks,
            reshapes_outputs=checks.reshapes_outputs,
        )
        served.statistics = Statistics(served)
        served.scheduler = schedulers[name] = Functions(served, run)
        registry.set_state(name, 1, VersionState.READY, served=served)
    regions = make_regions(chosen)
    return LittleServer(
        core,
        v2_router(core, chosen, regions),
        v2_methods(core, chosen, regions) | HealthMethods(core).methods(),
        schedulers,
    )


def _specs(config: ModelConfig, fields: Iterable[Any]) -> dict[str, TensorSpec]:
    batch = (-1,) if config.max_batch_size > 0 else ()
    return {one.name: TensorSpec(one.name, DataType.from_proto(one.data_type), (*batch, *one.dims)) for one in fields}


def joined(reply: Reply) -> bytes:
    assert isinstance(reply, HttpResponse)
    return b"".join(bytes(part) for part in reply.body)


async def collected(reply: Reply) -> bytes:
    assert isinstance(reply, HttpStream)
    return b"".join([bytes(part) async for part in reply.chunks])


def from_base64(text: str) -> bytes:
    return base64.b64decode(text)
