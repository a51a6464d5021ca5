"""An LLM of the backend, in this process, and its answers."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enginehouse.backend import LoadContext, Placement
from enginehouse.config.schema import ModelConfig, ModelParameter
from enginehouse.types import FinishReason, GenerateRequest, SamplingParameters, TokenEvent, TokenLogprob
from enginehouse_backends.llm.backend import LlmBackend, LlmInstance

TIMEOUT_S = 60
GREEDY = SamplingParameters(temperature=0.0, max_tokens=24, ignore_eos=True)


@dataclass
class Result:
    """All events of one request, joined."""

    events: list[TokenEvent] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for event in self.events for token_id in event.token_ids]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def logprobs(self) -> list[Sequence[TokenLogprob]]:
        return [row for event in self.events for row in event.logprobs]

    @property
    def last(self) -> TokenEvent:
        return self.events[-1]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.last.finish_reason


class Serving:
    """One loaded LLM. `settings` are fields of serving.llm; kv_bytes and parameters beside them."""

    def __init__(
        self,
        folder: Path,
        name: str = "m",
        kv_bytes: int = 8 << 20,
        parameters: dict[str, str] | None = None,
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        config = ModelConfig(name=name, backend="llm")
        config.serving.memory.kv_bytes = kv_bytes
        for key, value in {"engine_group": "test", **settings}.items():
            setattr(config.serving.llm, key, value)
        for key, text in {"num_threads": "2", **(parameters or {})}.items():
            config.parameters[key].CopyFrom(ModelParameter(string_value=text))
        context = LoadContext(config, 1, folder)
        backend = LlmBackend()
        self.config = backend.complete_config(context)
        self.model = backend.load(LoadContext(self.config, 1, folder))
        instance = self.model.create_instance(Placement("m_0_0", device))
        assert isinstance(instance, LlmInstance)
        self.instance = instance
        self._queues: dict[str, queue.SimpleQueue[TokenEvent]] = defaultdict(queue.SimpleQueue)
        self._num_requests = 0
        self.steps: list[int] = []
        """Events of each step that emitted any."""
        instance.start(self._take)

    def _take(self, events: Sequence[TokenEvent]) -> None:
        self.steps.append(len(events))
        for event in events:
            self._queues[event.request_id].put(event)

    def submit(self, prompt: Any, sampling: SamplingParameters = GREEDY, **fields: Any) -> str:
        self._num_requests += 1
        request_id = f"{self.config.name}-{self._num_requests}"
        self.instance.submit(GenerateRequest(self.config.name, request_id, prompt, sampling, **fields))
        return request_id

    def next_event(self, request_id: str) -> TokenEvent:
        return self._queues[request_id].get(timeout=TIMEOUT_S)

    def result(self, request_id: str) -> Result:
        result = Result()
        while not result.events or result.finish_reason is None:
            result.events.append(self.next_event(request_id))
        assert self._queues.pop(request_id).empty(), "events after the last one"
        return result

    def generate(self, prompt: Any, sampling: SamplingParameters = GREEDY, **fields: Any) -> Result:
        return self.result(self.submit(prompt, sampling, **fields))

    def generate_all(self, prompts: Iterable[Any], sampling: SamplingParameters = GREEDY) -> list[Result]:
        """All at once."""
        with self.held():
            request_ids = [self.submit(prompt, sampling) for prompt in prompts]
        return [self.result(request_id) for request_id in request_ids]

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine waits: what is submitted meanwhile arrives at the same moment, however busy the machine is."""
        go_on = threading.Event()

        def wait() -> None:
            go_on.wait(TIMEOUT_S)

        self.instance.engine._inbox.put(wait)
        try:
            yield
        finally:
            go_on.set()

    def check(self) -> None:
        """Nothing is held any more, and the books are right."""
        self.instance.engine.call(self.instance.engine.check_integrity)
        assert self.instance.llm.num_open == 0
        assert self.instance.llm.scheduler.pool.num_live == 0

    def close(self) -> None:
        self.instance.close()
        self.model.close()
