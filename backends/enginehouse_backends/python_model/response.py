"""pb_utils.InferenceResponse and the sender through which models answer when and as often as they like."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from enginehouse.errors import FailureReason, Internal
from enginehouse.types import InferRequest, InferResponse, ParameterValue
from enginehouse_backends.python_model.context import running
from enginehouse_backends.python_model.errors import TritonError, TritonModelException, to_model, to_server
from enginehouse_backends.python_model.tensor import Tensor

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class InferenceResponse:
    """Output tensors, or an error, and parameters that go along (bool, int or str)."""

    __slots__ = ("_error", "_output_tensors", "_parameters")

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, ParameterValue] | None = None,
    ) -> None:
        for tensor in output_tensors:
            if not isinstance(tensor, Tensor):
                raise TritonModelException(
                    "Output tensor for inference response should not be empty."
                    if tensor is None
                    else f"Expected a 'Tensor' in output_tensors, found type '{type(tensor)}'."
                )
        if error is not None and not isinstance(error, TritonError):
            raise TypeError(f"InferenceResponse(error: TritonError): found type '{type(error)}'")
        self._output_tensors = output_tensors
        self._error = error
        self._parameters = check_parameters(parameters)

    def output_tensors(self) -> list[Tensor]:
        return list(self._output_tensors)

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        """As JSON."""
        return json.dumps(self._parameters)

    def to_server(self, final: bool) -> InferResponse:
        if self._error is not None:
            return InferResponse(error=to_server(self._error), final=final, parameters=self._parameters)
        outputs = [tensor.to_wire() for tensor in self._output_tensors]
        return InferResponse(outputs, final=final, parameters=self._parameters)

    @classmethod
    def of_server(cls, response: InferResponse) -> InferenceResponse:
        made = cls.__new__(cls)
        made._output_tensors = [Tensor.of_wire(tensor) for tensor in response.outputs]
        made._error = to_model(response.error) if response.error is not None else None
        made._parameters = response.parameters
        return made


def check_parameters(parameters: Any) -> Mapping[str, ParameterValue]:
    """Raises TritonModelException for what the protocols can't carry."""
    if not parameters:
        return {}
    if not isinstance(parameters, Mapping):
        raise TritonModelException(f"Expect parameters to be a dict, found type {type(parameters)}")
    for key, value in parameters.items():
        if not isinstance(key, str):
            raise TritonModelException(f"Expect parameters keys to have type str, found type {type(key)}")
        if not isinstance(value, (bool, int, str)):
            raise TritonModelException(f"Expect parameters values to have type bool/int/str, found type {type(value)}")
    return dict(parameters)


class InferenceResponseSender:
    """The way out of one request. May be used from any thread, after `execute` too."""

    __slots__ = ("_closed", "_num_sent", "_request")

    def __init__(self, request: InferRequest) -> None:
        self._request = request
        self._closed = False
        self._num_sent = 0

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """Raises TritonModelException for a flag or an order that makes no sense."""
        final = flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if not final and flags != 0:
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if not final and response is None:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        if self._closed:
            raise TritonModelException("Unable to send response. Response sender has been closed.")
        if not running.decoupled:
            self._check_single(response)
        self._closed = final
        sink = self._request.sink
        assert sink is not None, "the host sets it: a bug"
        if response is None:
            sink(InferResponse(final=True, has_response=False))
            return
        self._num_sent += 1
        # A model that isn't decoupled has said all with its one answer; the flag may follow or not.
        sink(response.to_server(final or not running.decoupled))

    def _check_single(self, response: InferenceResponse | None) -> None:
        if response is not None and self._num_sent:
            raise TritonModelException(
                "Unable to send response. Non-decoupled model cannot send more than one response."
            )
        if response is None and not self._num_sent:
            raise TritonModelException(
                "Unable to send response. Non-decoupled model cannot send complete final before sending a response."
            )

    def is_cancelled(self) -> bool:
        services = running.services
        if services is not None:
            services.poll()
        return self._request.cancelled

    def __del__(self) -> None:
        if not self._closed and (running.decoupled or not self._num_sent):
            give_up(self._request)


def give_up(request: InferRequest) -> None:
    """The model has let go of a request that still owes its final answer: nobody else can give it. If there
    was one after all, by the list that `execute` returned, the host ignores this."""
    if request.sink is not None and not sys.is_finalizing():
        request.sink(InferResponse(error=Internal(_DROPPED, reason=FailureReason.BACKEND)))


_DROPPED = "the model let go of the request without its final response"
