"""Models in real processes, for the tests of this folder: load one, send it batches, see what comes back."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from google.protobuf import text_format

from enginehouse.backend import LoadContext
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError
from enginehouse.execution.contract import Batch, HostedModel, HostHealth, HostState
from enginehouse.execution.hosts import HostOptions, ModelHosts
from enginehouse.types import InferRequest, InferResponse, Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = """
name: "m" backend: "requests" max_batch_size: 16
input [{ name: "X" data_type: TYPE_INT32 dims: [ -1 ] }]
output [{ name: "Y" data_type: TYPE_INT32 dims: [ -1 ] }, { name: "PID" data_type: TYPE_INT32 dims: [ 1 ] }]
serving { host: HOST_PROCESS supervision { backoff_initial_s: 0.01 } }
"""
BACKENDS = {
    "requests": "tests.faults.backends_under_test:RequestsBackend",
    "generative": "tests.faults.backends_under_test:GenerativeBackend",
    "tensors": "tests.faults.backends_under_test:TensorsBackend",
}


@dataclass
class Answered:
    """What came back for one batch."""

    responses: dict[str, list[InferResponse]] = field(default_factory=dict)
    error: EnginehouseError | None = None

    def texts(self) -> set[str]:
        return {str(answers[-1].error) for answers in self.responses.values()}

    def values(self, output: str = "Y") -> list[list[int]]:
        answers = [answers[-1].outputs for answers in self.responses.values()]
        return [next(t for t in outputs if t.name == output).numpy().reshape(-1).tolist() for outputs in answers]


@dataclass
class Hosted:
    model: HostedModel
    hosts: ModelHosts
    healths: list[HostHealth]

    async def run(self, *values: int, instance: int = 0) -> Answered:
        """One batch of one request a value; done when every request has its final answer."""
        requests = [request_of(value) for value in values]
        return await self.run_requests(requests, instance)

    async def run_requests(self, requests: Sequence[InferRequest], instance: int = 0) -> Answered:
        answered = Answered({request.id: [] for request in requests})
        finished = asyncio.Event()
        owed = [len(requests) + 1]

        def count(number: int) -> None:
            owed[0] -= number
            if owed[0] == 0:
                finished.set()

        def on_response(request: InferRequest, response: InferResponse) -> None:
            answered.responses[request.id].append(response)
            count(int(response.final))

        def on_done(batch: Batch, times: object, error: EnginehouseError | None) -> None:
            answered.error = error
            count(1)

        self.model.instances[instance].execute(Batch(requests, on_response, on_done))
        await asyncio.wait_for(finished.wait(), 30)
        return answered

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  processes give no event for what tests look at
                await asyncio.sleep(0.01)

    async def until_ready(self) -> None:
        await self.until(lambda: all(instance.available for instance in self.model.instances))

    async def pid(self, instance: int = 0) -> int:
        return (await self.run(1, instance=instance)).values("PID")[0][0]

    @property
    def state(self) -> HostState:
        return self.model.health.state


def request_of(value: int, columns: int = 2) -> InferRequest:
    array = np.full((1, columns), value, np.int32)
    request = InferRequest("m", inputs={"X": Tensor.from_numpy("X", array)}, batch_size=1)
    request.id = f"{value} {id(request)}"
    return request


def child_pids() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def open_descriptors() -> Counter[str]:
    """By kind. Segments aren't counted: answers that a test still holds keep theirs."""
    links = Counter[str]()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links[os.readlink(entry).partition(":")[0]] += 1
        except FileNotFoundError:
            continue  # the one that lists the folder
    return Counter({kind: count for kind, count in links.items() if "memfd" not in kind})


def workers_find_tests() -> None:
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in path:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *path])


@asynccontextmanager
async def hosted(
    changes: str = "", options: HostOptions | None = None, directory: Path = HERE
) -> AsyncIterator[Hosted]:
    """A model of one of BACKENDS, or the folder's model.py. Afterwards nothing may be left: no process, no
    descriptor, no entry in the ledger."""
    workers_find_tests()
    config = text_format.Merge(changes, text_format.Parse(CONFIG, ModelConfig()))
    hosts = ModelHosts(options=options or HostOptions(more_backends=BACKENDS))
    healths: list[HostHealth] = []
    before, children = open_descriptors(), child_pids()
    try:
        model = await hosts.load(LoadContext(config, 1, directory), healths.append)
        yield Hosted(model, hosts, healths)
        await model.close()
    finally:
        await hosts.close()
    assert child_pids() == children
    assert open_descriptors() <= before  # a gRPC client of an earlier test may close its own meanwhile
    assert hosts.ledger.entries() == []
