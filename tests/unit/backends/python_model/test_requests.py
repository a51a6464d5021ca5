"""What a model reads of a request, what it sends when it answers by itself, and what it asks of others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.unit.backends.python_model.models import ModelUnderTest, collect, request_of
from tests.unit.backends.python_model.test_execute import failure, model

from enginehouse.errors import EnginehouseError, NotFound
from enginehouse.types import InferRequest, InferResponse, Tensor

DECOUPLED = "model_transaction_policy { decoupled: true }"


def test_everything_that_a_request_carries_can_be_read(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    r = requests[0]
    import json
    seen = [r.request_id(), r.correlation_id(), r.flags(), r.timeout(), json.loads(r.parameters()),
            r.requested_output_names(), r.is_cancelled(), r.inputs()[0].name(), r.inputs()[0].shape(),
            r.inputs()[0].triton_dtype(), r.inputs()[0].is_cpu(),
            pb_utils.get_input_tensor_by_name(r, "NOPE") is None]
    return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([json.dumps(seen)], dtype=np.object_))])]
"""
    [[response]] = model(tmp_path, body).run(
        [1, 2],
        id="abc",
        correlation_id="corr",
        sequence_start=True,
        sequence_end=True,
        timeout_us=77,
        parameters={"k": True},
    )
    assert json.loads(response.outputs[0].numpy()[0]) == [
        "abc", "corr", 3, 77, {"k": True}, ["Y"], False, "X", [2], 8, True, True,
    ]  # fmt: skip


def test_cancellation_is_looked_up_when_it_is_asked_for(tmp_path: Path) -> None:
    under_test = model(
        tmp_path,
        """
def execute(self, requests):
    seen = [requests[0].is_cancelled(), requests[0].is_cancelled()]
    return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array(seen))])]
""",
    )
    with under_test.instance() as instance:
        request = request_of(np.zeros(1, np.int32))
        answers = collect(request)
        polls = iter([lambda: None, request.cancel])
        under_test.services.on_poll = lambda: next(polls)()
        instance.execute([request])
    assert answers[0].outputs[0].numpy().tolist() == [False, True]


def test_the_trace_context_can_be_passed_on(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    contexts = [str(requests[0].trace().get_context()), str(pb_utils.InferenceTrace().get_context())]
    return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array(contexts, dtype=np.object_))])]
"""
    [[response]] = model(tmp_path, body).run([1], trace="00-ab-cd-01")
    assert response.outputs[0].numpy().tolist() == [b'{"traceparent": "00-ab-cd-01"}', b"None"]


# --- the response sender


SENDER = """
def execute(self, requests):
    sender = requests[0].get_response_sender()
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    response = pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([1], np.int32))])
    {}
"""


def test_a_decoupled_model_answers_as_often_as_it_likes(tmp_path: Path) -> None:
    body = SENDER.format("sender.send(response); sender.send(response); sender.send(flags=final)")
    [answers] = model(tmp_path, body, DECOUPLED).run([1])
    assert [(a.final, a.has_response, len(a.outputs)) for a in answers] == [
        (False, True, 1), (False, True, 1), (True, False, 0)]  # fmt: skip


def test_the_last_response_may_carry_the_flag(tmp_path: Path) -> None:
    [answers] = model(tmp_path, SENDER.format("sender.send(response, final)"), DECOUPLED).run([1])
    assert [(a.final, a.has_response) for a in answers] == [(True, True)]


def test_a_model_that_is_not_decoupled_may_use_the_sender_once(tmp_path: Path) -> None:
    [answers] = model(tmp_path, SENDER.format("sender.send(response); sender.send(flags=final)")).run([1])
    assert [a.final for a in answers if a.has_response] == [True]


@pytest.mark.parametrize(
    ("use", "changes", "text"),
    [
        ("sender.send(response, 5)", DECOUPLED, "Unable to send response. Unsupported flag provided."),
        (
            "sender.send()",
            DECOUPLED,
            "Inference Response object must be provided when the response flags is set to zero.",
        ),
        (
            "sender.send(flags=final); sender.send(response)",
            DECOUPLED,
            "Unable to send response. Response sender has been closed.",
        ),
        (
            "sender.send(response); sender.send(response)",
            "",
            "Unable to send response. Non-decoupled model cannot send more than one response.",
        ),
        (
            "sender.send(flags=final)",
            "",
            "Unable to send response. Non-decoupled model cannot send complete final before sending a response.",
        ),
    ],
)
def test_misuse_of_the_sender_is_refused(tmp_path: Path, use: str, changes: str, text: str) -> None:
    assert f"TritonModelException: {text}" in failure(tmp_path, SENDER.format(use), changes)


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        ("def execute(self, requests):\n    return None", DECOUPLED),
        (SENDER.format("sender.send(response)"), DECOUPLED),
        (SENDER.format("pass"), ""),
    ],
)
def test_letting_go_of_a_request_without_its_final_response_is_an_error(
    tmp_path: Path, body: str, changes: str
) -> None:
    [answers] = model(tmp_path, body, changes).run([1])
    assert str(answers[-1].error) == "the model let go of the request without its final response"
    assert answers[-1].final


def test_a_request_that_is_kept_may_be_answered_later(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    self.kept = getattr(self, "kept", []) + list(requests)
    if len(self.kept) == 2:
        for request in self.kept:
            request.get_response_sender().send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self.kept = []
"""
    with model(tmp_path, body, DECOUPLED).instance() as instance:
        first, second = request_of(np.zeros(1, np.int32)), request_of(np.zeros(1, np.int32))
        answers = collect(first)
        collect(second)
        instance.execute([first])
        assert answers == []
        instance.execute([second])
        assert [(answer.final, answer.error) for answer in answers] == [(True, None)]


# --- asking other models


def bls(folder: Path, body: str) -> ModelUnderTest:
    under_test = model(
        folder,
        f"""
def ask(self, **more):
    inputs = [pb_utils.Tensor("X", np.array([1, 2], np.int32))]
    return pb_utils.InferenceRequest(model_name="other", requested_output_names=["Y"], inputs=inputs, **more)
def say(self, *what):
    text = np.array([str(item) for item in what], dtype=np.object_)
    return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", text)])]
{body}""",
    )
    under_test.services.models["other"] = double
    return under_test


def double(request: InferRequest) -> list[InferResponse]:
    return [InferResponse([Tensor.from_numpy("Y", request.inputs["X"].numpy() * 2)])]


def said(under_test: ModelUnderTest) -> list[str]:
    [[response]] = under_test.run([1])
    return [item.decode() for item in response.outputs[0].numpy()]


def test_exec_gives_the_answer(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    response = self.ask().exec()
    return self.say(response.has_error(), pb_utils.get_output_tensor_by_name(response, "Y").as_numpy())
"""
    assert said(bls(tmp_path, body)) == ["False", "[2 4]"]


def test_the_request_carries_what_the_model_said(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    self.ask(request_id="i", correlation_id=9, flags=3, timeout=5, model_version=2, parameters={"p": 1}).exec()
    return self.say()
"""
    under_test = bls(tmp_path, body)
    seen: list[InferRequest] = []
    under_test.services.models["other"] = lambda request: seen.append(request) or double(request)  # type: ignore[func-returns-value]
    said(under_test)
    [request] = seen
    assert (request.id, request.correlation_id, request.timeout_us, request.model_version) == ("i", 9, 5, "2")
    assert (request.sequence_start, request.sequence_end, request.parameters) == (True, True, {"p": 1})


def test_an_error_is_in_the_answer(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    response = self.ask().exec()
    error = response.error()
    return self.say(response.has_error(), error.message(), error.code() == pb_utils.TritonError.NOT_FOUND)
"""
    under_test = bls(tmp_path, body)
    under_test.services.models["other"] = lambda request: [InferResponse(error=NotFound("nobody"))]
    assert said(under_test) == ["True", "nobody", "True"]


def test_async_exec_is_awaited_side_by_side(tmp_path: Path) -> None:
    body = """
async def execute(self, requests):
    import asyncio
    answers = await asyncio.gather(*[self.ask().async_exec() for _ in range(3)])
    return self.say(*[answer.output_tensors()[0].as_numpy() for answer in answers])
"""
    assert said(bls(tmp_path, body)) == ["[2 4]"] * 3


@pytest.mark.parametrize(
    ("prefix", "call"), [("def", "self.ask().exec(True)"), ("async def", "await self.ask().async_exec(decoupled=True)")]
)
def test_a_decoupled_models_answers_are_iterated_and_end_with_an_empty_one(
    tmp_path: Path, prefix: str, call: str
) -> None:
    body = f"""
{prefix} execute(self, requests):
    responses = {call}
    first = [len(r.output_tensors()) for r in responses]
    return self.say(first, [len(r.output_tensors()) for r in responses])
"""
    under_test = bls(tmp_path, body)
    some = InferResponse([Tensor.from_numpy("Y", np.zeros(1))], final=False)
    under_test.services.models["other"] = lambda request: [some, some, InferResponse(has_response=False)]
    assert said(under_test) == ["[1, 1, 0]", "[1, 1, 0]"]


def test_bls_is_refused_in_initialize(tmp_path: Path) -> None:
    body = "def initialize(self, args):\n    self.ask().exec()"
    with pytest.raises(EnginehouseError, match="BLS is only supported during the 'execute' function"):
        said(bls(tmp_path, body))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("", "TypeError: InferenceRequest() needs inputs: a list of Tensor; it has none"),
        ("inputs=[1]", "TypeError: InferenceRequest() needs inputs: a list of Tensor; it has [1]"),
        (
            "inputs=[X], requested_output_names='Y'",
            "TypeError: InferenceRequest() needs requested_output_names: a list of str; it has 'Y'",
        ),
        (
            "inputs=[X], requested_output_names=['Y'], model_name=3",
            "TypeError: InferenceRequest() needs model_name: a str; it has 3",
        ),
        (
            "inputs=[X], requested_output_names=['Y'], model_name='m', preferred_memory=3",
            "TypeError: InferenceRequest() needs preferred_memory: a PreferredMemory; it has 3",
        ),
        (
            "inputs=[X], requested_output_names=['Y'], model_name='m', trace=3",
            "TypeError: InferenceRequest() needs trace: an InferenceTrace; it has 3",
        ),
        (
            "inputs=[X], requested_output_names=['Y'], model_name='m', parameters='{}'",
            "TritonModelException: Expect parameters to be a dict, found type <class 'str'>",
        ),
        (
            "inputs=[None], requested_output_names=['Y'], model_name='m'",
            "TritonModelException: Input tensor for request with id '' and model name 'm' should not be empty.",
        ),
    ],
)
def test_a_wrong_bls_request_says_what_it_lacks(tmp_path: Path, arguments: str, error: str) -> None:
    body = f"""
def execute(self, requests):
    X = pb_utils.Tensor("X", np.array([1, 2], np.int32))
    try:
        return self.say(pb_utils.InferenceRequest({arguments}))
    except Exception as problem:
        return self.say(type(problem).__name__ + ": " + str(problem))
"""
    assert said(bls(tmp_path, body)) == [error]


@pytest.mark.parametrize(("version", "asked"), [(-1, ""), (3, "3"), (0, "0"), (-2, "-2")])
def test_only_version_minus_one_of_another_model_is_the_newest(tmp_path: Path, version: int, asked: str) -> None:
    seen = []

    def record(request: InferRequest) -> list[InferResponse]:
        seen.append(request.model_version)
        return double(request)

    under_test = bls(
        tmp_path, f"def execute(self, requests):\n    return self.say(self.ask(model_version={version}).exec())"
    )
    under_test.services.models["other"] = record
    said(under_test)
    assert seen == [asked]


def test_the_config_comes_before_the_files_when_a_model_is_loaded(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    pb_utils.load_model("a", "{}", {"file:1/model.py": b"x"})
    return self.say()
"""
    under_test = bls(tmp_path, body)
    said(under_test)
    assert under_test.services.asked == [("load", "a", "{}", {"file:1/model.py": b"x"})]


def test_models_are_loaded_and_unloaded(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    pb_utils.load_model("a", files={"file:1/model.py": b"x"}, config="{}")
    pb_utils.unload_model("a", unload_dependents=True)
    return self.say(pb_utils.is_model_ready("other"), pb_utils.is_model_ready("a", "1"))
"""
    under_test = bls(tmp_path, body)
    assert said(under_test) == ["True", "False"]
    assert under_test.services.asked == [("load", "a", "{}", {"file:1/model.py": b"x"}), ("unload", "a", True)]


def test_logs_say_where_they_come_from(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    pb_utils.Logger.log_warn("careful")
    pb_utils.Logger.log("so so", pb_utils.Logger.VERBOSE)
    return self.say()
"""
    under_test = bls(tmp_path, body)
    said(under_test)
    assert under_test.services.asked == [
        ("log", "WARNING", "careful", "model.py"), ("log", "VERBOSE", "so so", "model.py")]  # fmt: skip


def test_metrics_are_the_servers(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    family = pb_utils.MetricFamily(name="f", description="d", kind=pb_utils.MetricFamily.HISTOGRAM)
    metric = family.Metric(labels={"a": "b"}, buckets=[1, 2])
    metric.observe(3)
    return self.say(metric.value())
"""
    under_test = bls(tmp_path, body)
    assert said(under_test) == ["5.0"]
    assert under_test.services.asked[:3] == [
        ("family", "f", {}, {"description": "d", "kind": "histogram"}),
        ("metric", "f", {"a": "b"}, [1, 2]),
        ("observe", "f", {"a": "b"}, 3.0),
    ]
    assert [asked[0] for asked in under_test.services.asked[4:]] == ["remove_metric", "remove_family"]
