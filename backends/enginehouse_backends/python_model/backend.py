"""model.py as a backend: initialize, execute, finalize, in a process of each instance's own."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar

from enginehouse.backend import Backend, HostKind, LoadContext, Model, Placement, RequestInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import FailureReason, Internal
from enginehouse.types import InferRequest, InferResponse

_logger = logging.getLogger("enginehouse.python_model")


class PythonBackend(Backend):
    """Imports nothing of a model until it is loaded: the server asks this class for a host and no more."""

    name = "python"
    default_filename = "model.py"
    process_per_instance = True

    def host_kind(self, config: ModelConfig) -> HostKind:
        return HostKind.PROCESS

    def complete_config(self, context: LoadContext) -> ModelConfig:
        from enginehouse_backends.python_model import loading

        return loading.complete(context)

    def load(self, context: LoadContext) -> Model:
        from enginehouse_backends.python_model import loading

        loading.set_running(context)
        return PythonModel(context, loading.import_model_class(context))


class PythonModel(Model):
    def __init__(self, context: LoadContext, model_class: Any) -> None:
        self._context = context
        self._model_class = model_class

    def create_instance(self, placement: Placement) -> RequestInstance:
        return PythonInstance(self._context, self._model_class, placement)


def initialize_arguments(context: LoadContext, placement: Placement) -> dict[str, str]:
    """What `initialize` is given."""
    from enginehouse.config.json_form import to_json

    kind, _, number = placement.device.partition(":")
    return {
        "model_config": to_json(context.config),
        "model_instance_kind": {"cpu": "CPU", "model": "MODEL"}.get(kind, "GPU"),
        "model_instance_name": placement.name,
        "model_instance_device_id": number or "0",
        "model_repository": str(context.model_directory),
        "model_version": str(context.version),
        "model_name": context.name,
    }


class PythonInstance(RequestInstance):
    """One TritonPythonModel object."""

    polls_for_cancellation: ClassVar[bool] = True

    def __init__(self, context: LoadContext, model_class: Any, placement: Placement) -> None:
        from enginehouse_backends.python_model import request, response
        from enginehouse_backends.python_model.context import running
        from enginehouse_backends.python_model.errors import describe

        self._running = running
        self._describe = describe
        self._request_of = request.InferenceRequest.of_server
        self._response_class = response.InferenceResponse
        self._name = placement.name
        self._file = str(context.version_directory)
        self._decoupled = context.config.model_transaction_policy.decoupled
        self._loop: asyncio.AbstractEventLoop | None = None
        running.instance_name = placement.name
        try:
            self._model = model_class()
            if hasattr(self._model, "initialize"):
                self._model.initialize(initialize_arguments(context, placement))
        except Exception as problem:
            raise Internal(describe(problem)) from problem
        running.is_executing_allowed = True
        self._execute = getattr(self._model, "execute", None)
        if inspect.iscoroutinefunction(self._execute) and context.services is not None:
            context.services.listen()

    def execute(self, requests: Sequence[InferRequest]) -> None:
        if self._execute is None:
            raise self._failed(f"Python model {self._file} does not implement `execute` method.")
        wrapped = [self._request_of(request) for request in requests]
        try:
            returned = self._execute(wrapped)
            if type(returned) is not list and asyncio.iscoroutine(returned):
                returned = self._run(returned)
        except Exception as problem:
            raise self._failed(self._describe(problem)) from problem
        self._answer(wrapped, returned)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """A decoupled model's coroutines run beside each other; any other's is waited for."""
        if self._decoupled:
            self._run_beside(work)
            return None
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(work)

    def _run_beside(self, work: Coroutine[Any, Any, Any]) -> None:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="model coroutines", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        future.add_done_callback(self._log_failure)

    def _log_failure(self, done: Future[Any]) -> None:
        problem = done.exception()
        if problem is not None:
            _logger.error("model '%s': %s", self._name, self._describe(problem))

    def _answer(self, requests: Sequence[Any], returned: Any) -> None:
        """Raises Internal, as Triton words it, for what `execute` may not return."""
        if returned is None:
            self._check_answered(requests)
            return
        if self._decoupled:
            raise self._failed(
                f"Python model '{self._name}' is using the decoupled mode and the execute function must return None."
            )
        if not isinstance(returned, list):
            raise self._failed(f"Expected a list in the execute return, found type '{type(returned)}'.")
        if len(returned) != len(requests):
            raise self._failed(
                f"Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{len(requests)}, and InferenceResponse(s) size is:{len(returned)}\n"
            )
        response_class = self._response_class
        for request, response in zip(requests, returned, strict=True):
            if request.is_rescheduled or type(response) is not response_class:
                self._check_returned(request, response)
        for request, response in zip(requests, returned, strict=True):
            if request.is_rescheduled:
                request.served.sink(InferResponse(has_response=False, reschedule=True))
            elif response is not None:
                request.served.sink(response.to_server(final=True))

    def _check_returned(self, request: Any, response: Any) -> None:
        if request.is_rescheduled:
            if response is not None:
                raise self._failed(
                    f"Expected a None object in the execute function return list for reschduled request, found "
                    f"type '{type(response)}'."
                )
        elif response is None and request._sender is not None:
            return  # answered through its sender, or about to be
        elif not isinstance(response, self._response_class):
            raise self._failed(
                f"Expected an 'InferenceResponse' object in the execute function return list, found type "
                f"'{type(response)}'."
            )

    def _check_answered(self, requests: Sequence[Any]) -> None:
        """`execute` returned None: fine if every request goes on through its sender, or once more."""
        for request in requests:
            if request.is_rescheduled:
                request.served.sink(InferResponse(has_response=False, reschedule=True))
            elif not self._decoupled and request._sender is None:
                raise self._failed(f"Expected a list in the execute return, found type '{type(None)}'.")

    def _failed(self, message: str) -> Internal:
        return Internal(
            f"Failed to process the request(s) for model '{self._name}', message: {message}",
            reason=FailureReason.BACKEND,
        )

    def is_ready(self) -> bool:
        asked = getattr(self._model, "is_ready", None)
        if asked is None:
            return True
        answer = asked()
        return bool(self._run_apart(answer) if asyncio.iscoroutine(answer) else answer)

    @staticmethod
    def _run_apart(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(work)

    def close(self) -> None:
        self._running.is_executing_allowed = False
        if hasattr(self._model, "finalize"):
            try:
                self._model.finalize()
            except Exception as problem:
                _logger.error("model '%s': finalize failed: %s", self._name, self._describe(problem))
        if self._loop is not None and not self._loop.is_running():
            self._loop.close()
