"""What `execute` may return and raise, word for word as Triton's clients know it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.backends.python_model.models import ModelUnderTest

from enginehouse.errors import EnginehouseError, ErrorCode, Internal

HEAD = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
"""


def model(folder: Path, body: str, changes: str = "") -> ModelUnderTest:
    lines = "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
    return ModelUnderTest(folder, HEAD + lines, changes)


def failure(folder: Path, body: str, changes: str = "") -> str:
    with pytest.raises(EnginehouseError) as error:
        model(folder, body, changes).run([1])
    return str(error.value)


def test_each_request_gets_its_response(tmp_path: Path) -> None:
    answers = model(
        tmp_path,
        """
def execute(self, requests):
    return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", r.inputs()[0].as_numpy() * 2)]) for r in requests]
""",
    ).run([1, 2], [3])
    assert [answer[0].outputs[0].numpy().tolist() for answer in answers] == [[2, 4], [6]]
    assert [answer[0].final for answer in answers] == [True, True]


def test_a_coroutine_is_run(tmp_path: Path) -> None:
    under_test = model(
        tmp_path,
        """
async def execute(self, requests):
    return [pb_utils.InferenceResponse([r.inputs()[0]]) for r in requests]
""",
    )
    [[response]] = under_test.run([4])
    assert response.outputs[0].numpy().tolist() == [4]
    assert ("listen",) in under_test.services.asked


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ("7", "Expected a list in the execute return, found type '<class 'int'>'."),
        ("None", "Expected a list in the execute return, found type '<class 'NoneType'>'."),
        (
            "[]",
            "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
            "InferenceRequest(s) size is:1, and InferenceResponse(s) size is:0\n",
        ),
        (
            "['text']",
            "Expected an 'InferenceResponse' object in the execute function return list, found type '<class 'str'>'.",
        ),
    ],
)
def test_other_returns_fail_the_batch(tmp_path: Path, returned: str, text: str) -> None:
    body = f"def execute(self, requests):\n    return {returned}"
    assert failure(tmp_path, body) == f"Failed to process the request(s) for model 'm_0_0', message: {text}"


def test_a_decoupled_model_must_return_none(tmp_path: Path) -> None:
    text = failure(
        tmp_path, "def execute(self, requests):\n    return []", "model_transaction_policy { decoupled: true }"
    )
    assert text.endswith("Python model 'm_0_0' is using the decoupled mode and the execute function must return None.")


def test_an_exception_comes_with_its_places_innermost_first(tmp_path: Path) -> None:
    text = failure(
        tmp_path,
        """
def execute(self, requests):
    self.deeper()
def deeper(self):
    raise ValueError("told to fail")
""",
    )
    file = tmp_path / "1" / "model.py"
    assert text == (
        f"Failed to process the request(s) for model 'm_0_0', message: ValueError: told to fail\n\nAt:\n"
        f"  {file}(9): deeper\n  {file}(7): execute\n"
    )


def test_a_model_without_execute_loads_and_says_so_when_asked(tmp_path: Path) -> None:
    assert failure(tmp_path, "pass").endswith("does not implement `execute` method.")


@pytest.mark.parametrize(
    ("code", "expected"),
    [("UNKNOWN", ErrorCode.UNKNOWN), ("NOT_FOUND", ErrorCode.NOT_FOUND), ("CANCELLED", ErrorCode.CANCELLED)],
)
def test_an_error_response_has_its_code_and_does_not_count_as_a_failure(
    tmp_path: Path, code: str, expected: ErrorCode
) -> None:
    body = f"""
def execute(self, requests):
    return [pb_utils.InferenceResponse(error=pb_utils.TritonError("no", pb_utils.TritonError.{code}))]
"""
    [[response]] = model(tmp_path, body).run([1])
    assert response.error is not None
    assert (response.error.code, str(response.error), response.error.reason) == (expected, "no", None)


def test_response_parameters_go_along(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    return [pb_utils.InferenceResponse([], parameters={"a": 1, "b": True, "c": "x"})]
"""
    assert model(tmp_path, body).run([1])[0][0].parameters == {"a": 1, "b": True, "c": "x"}


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ("{1: 'x'}", "Expect parameters keys to have type str, found type <class 'int'>"),
        ("{'x': 1.5}", "Expect parameters values to have type bool/int/str, found type <class 'float'>"),
        ("{'x': None}", "Expect parameters values to have type bool/int/str, found type <class 'NoneType'>"),
    ],
)
def test_other_response_parameters_are_refused(tmp_path: Path, parameters: str, text: str) -> None:
    body = f"def execute(self, requests):\n    return [pb_utils.InferenceResponse([], parameters={parameters})]"
    assert f"TritonModelException: {text}\n\nAt:" in failure(tmp_path, body)


def test_a_rescheduled_request_is_handed_back(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    requests[0].set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
    return [None]
"""
    [[response]] = model(tmp_path, body).run([1])
    assert (response.reschedule, response.final, response.has_response) == (True, True, False)


def test_a_response_for_a_rescheduled_request_is_refused(tmp_path: Path) -> None:
    body = """
def execute(self, requests):
    requests[0].set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
    return [pb_utils.InferenceResponse([])]
"""
    assert "Expected a None object in the execute function return list for reschduled request" in failure(
        tmp_path, body
    )


def test_initialize_is_told_what_it_runs(tmp_path: Path) -> None:
    body = """
def initialize(self, args):
    import json
    self.seen = [args["model_name"], args["model_version"], args["model_instance_name"],
                 args["model_instance_kind"], args["model_instance_device_id"], args["model_repository"],
                 json.loads(args["model_config"])["input"][0]["data_type"], pb_utils.get_model_dir()]
def execute(self, requests):
    text = np.array([item.encode() for item in self.seen], dtype=np.object_)
    return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", text)])]
"""
    [[response]] = model(tmp_path, body).run([1])
    assert [item.decode() for item in response.outputs[0].numpy().tolist()] == [
        "m", "1", "m_0_0", "CPU", "0", str(tmp_path), "TYPE_INT32", str(tmp_path / "1"),
    ]  # fmt: skip


def test_finalize_is_called_and_may_fail(tmp_path: Path) -> None:
    body = f"""
def execute(self, requests):
    return [pb_utils.InferenceResponse([]) for _ in requests]
def finalize(self):
    open({str(tmp_path / "finalized")!r}, "w").close()
    raise RuntimeError("too late")
"""
    model(tmp_path, body).run([1])
    assert (tmp_path / "finalized").exists()


@pytest.mark.parametrize(("answer", "expected"), [("return True", True), ("return False", False)])
def test_the_models_own_readiness(tmp_path: Path, answer: str, expected: bool) -> None:
    for prefix in ("def", "async def"):
        with model(tmp_path, f"{prefix} is_ready(self):\n    {answer}").instance() as instance:
            assert instance.is_ready() is expected


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("VALUE = 1", "AttributeError: module '1.model' has no attribute 'TritonPythonModel'"),
        ("class X:\n    def f(self)\n        pass", "SyntaxError: expected ':' (model.py, line 2)"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'\n\nAt:\n"),
        (
            "class TritonPythonModel:\n    def initialize(self, args):\n        raise RuntimeError('cannot start')",
            "RuntimeError: cannot start\n\nAt:\n",
        ),
    ],
)
def test_what_is_wrong_with_the_file_is_the_loads_error(tmp_path: Path, source: str, text: str) -> None:
    with pytest.raises(Internal) as error, ModelUnderTest(tmp_path, source).instance():
        pass
    assert str(error.value).startswith(text)
