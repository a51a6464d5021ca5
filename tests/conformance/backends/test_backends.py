"""What every backend owes the plug-in contract; the same tests over all of them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from enginehouse.backend import TensorInstance
from enginehouse.errors import EnginehouseError, InvalidArgument
from enginehouse.types import DataType, Tensor

from .harness import Loaded, concatenated, context_of, load, run, tensor
from .subjects import SUBJECTS, Subject, documented_code

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


@pytest.fixture(params=SUBJECTS, ids=str)
def subject(request: pytest.FixtureRequest) -> Subject:
    chosen: Subject = request.param
    return chosen


@pytest.fixture
def loaded(subject: Subject, tmp_path: Path) -> Iterator[Loaded]:
    model = load(subject.backend(), tmp_path, subject.build(tmp_path, subject.datatype))
    yield model
    model.close()


def inputs_of(subject: Subject, array: Any, datatype: DataType | None = None) -> dict[str, Tensor]:
    return {subject.input_name: tensor(subject.input_name, array, datatype or subject.datatype)}


def sample(subject: Subject, num_rows: int = 3) -> dict[str, Tensor]:
    return inputs_of(subject, subject.sample(subject.datatype, num_rows))


def not_of_code(subject: Subject) -> None:
    if subject.is_code:
        pytest.skip("the artifact is a program of the user's")


# --- loading -------------------------------------------------------------------------------------------


def test_missing_artifact_is_an_error_that_names_it(subject: Subject, tmp_path: Path) -> None:
    text = subject.build(tmp_path, subject.datatype)
    (tmp_path / "1" / subject.artifact).unlink()
    with pytest.raises(EnginehouseError, match=subject.artifact):
        load(subject.backend(), tmp_path, text)


def test_artifact_that_is_none_is_an_error_that_names_it(subject: Subject, tmp_path: Path) -> None:
    text = subject.build(tmp_path, subject.datatype)
    (tmp_path / "1" / subject.artifact).write_bytes(b"this is ( no model")
    with pytest.raises(EnginehouseError, match=subject.artifact):
        load(subject.backend(), tmp_path, text)


def test_artifact_cut_off_in_the_middle_is_an_error_that_names_it(subject: Subject, tmp_path: Path) -> None:
    not_of_code(subject)
    text = subject.build(tmp_path, subject.datatype)
    path = tmp_path / "1" / subject.artifact
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(EnginehouseError, match=subject.artifact):
        load(subject.backend(), tmp_path, text)


def test_completing_a_config_again_changes_nothing(subject: Subject, loaded: Loaded) -> None:
    assert subject.backend().complete_config(loaded.context) == loaded.config


def test_completed_config_says_what_clients_must_know(loaded: Loaded) -> None:
    described: Any
    for described in (*loaded.config.input, *loaded.config.output):
        assert described.name
        assert described.data_type
        assert described.dims
    assert loaded.config.input
    assert loaded.config.output


def test_config_that_contradicts_the_artifact_is_refused_with_both(subject: Subject, tmp_path: Path) -> None:
    if subject.names_only_in_config:
        pytest.skip("the format doesn't say what its tensors are")
    text = subject.build(tmp_path, subject.datatype)
    wrong = f'input {{ name: "{subject.input_name}" data_type: TYPE_UINT64 }}'
    found = subject.datatype.config_name
    with pytest.raises(InvalidArgument, match=rf"TYPE_UINT64 for input '{subject.input_name}'.*{found}"):
        load(subject.backend(), tmp_path, f"{text} {wrong}")


def test_memory_needs_are_read_without_loading(subject: Subject, tmp_path: Path) -> None:
    not_of_code(subject)
    num_bytes = 1 << 20
    context = context_of(subject.backend(), tmp_path, subject.build_heavy(tmp_path, num_bytes))
    assert subject.backend().memory_needs(context).weights_bytes >= num_bytes


# --- inputs and outputs --------------------------------------------------------------------------------


def each_datatype() -> Iterator[Any]:
    for subject in SUBJECTS:
        for datatype in subject.datatypes:
            yield pytest.param(subject, datatype, id=f"{subject}-{datatype.wire_name}")


@pytest.mark.parametrize(("subject", "datatype"), each_datatype())
def test_every_data_type_goes_in_and_out_unchanged(subject: Subject, datatype: DataType, tmp_path: Path) -> None:
    model = load(subject.backend(), tmp_path, subject.build(tmp_path, datatype))
    array = subject.sample(datatype, 5)
    result = run(model.instances[0], inputs_of(subject, array, datatype))[subject.output_name]
    expected = subject.expected(array)
    if expected is not None:
        assert result.shape == expected.shape
        assert (result.numpy() == expected).all()
    assert isinstance(result.data, memoryview)
    model.close()


def test_special_numbers_survive(subject: Subject, tmp_path: Path) -> None:
    if DataType.FP32 not in subject.datatypes or subject.expected(np.ones((1, 4), np.float32)).shape != (1, 4):
        pytest.skip("the model is no identity")
    model = load(subject.backend(), tmp_path, subject.build(tmp_path, DataType.FP32))
    array = np.array([[np.nan, np.inf, -np.inf, -0.0]], dtype=np.float32)
    result = run(model.instances[0], inputs_of(subject, array, DataType.FP32))[subject.output_name]
    assert bytes(result.host_data()) == array.tobytes()
    model.close()


def test_wrong_data_type_is_an_error_that_names_found_and_expected(subject: Subject, loaded: Loaded) -> None:
    not_of_code(subject)
    wrong = {subject.input_name: tensor(subject.input_name, np.ones((1, 4), np.uint64), DataType.UINT64)}
    expected = subject.datatype.wire_name
    with pytest.raises(InvalidArgument, match=rf"'{subject.input_name}' .*UINT64.*{expected}"):
        run(loaded.instances[0], wrong)


def test_unknown_input_is_an_error_that_names_the_known_ones(subject: Subject, loaded: Loaded) -> None:
    not_of_code(subject)
    extra = {"SURPRISE": tensor("SURPRISE", np.ones((3, 4), np.float32), DataType.FP32)}
    with pytest.raises(InvalidArgument, match=rf"SURPRISE.*{subject.input_name}"):
        run(loaded.instances[0], {**sample(subject), **extra})


def test_missing_input_is_an_error_that_names_it(subject: Subject, loaded: Loaded) -> None:
    not_of_code(subject)
    with pytest.raises(InvalidArgument, match=subject.input_name):
        run(loaded.instances[0], {})


def test_wrong_shape_is_an_error_after_which_the_instance_goes_on(subject: Subject, loaded: Loaded) -> None:
    wide = np.concatenate([subject.sample(subject.datatype, 2)] * 2, axis=1)
    if subject.checks_shapes:
        with pytest.raises((EnginehouseError, ValueError)):
            run(loaded.instances[0], inputs_of(subject, wide))
    assert run(loaded.instances[0], sample(subject))[subject.output_name].shape[0] == 3


def test_empty_batch_has_an_empty_answer(subject: Subject, loaded: Loaded) -> None:
    full = run(loaded.instances[0], sample(subject))[subject.output_name]
    empty = run(loaded.instances[0], sample(subject, 0))[subject.output_name]
    assert empty.shape == (0, *full.shape[1:])
    assert empty.nbytes == 0


def test_batching_changes_no_result(subject: Subject, loaded: Loaded) -> None:
    array = subject.sample(subject.datatype, 9)
    together = run(loaded.instances[0], inputs_of(subject, array))
    parts = [array[start:stop] for start, stop in ((0, 1), (1, 3), (3, 9))]
    alone = concatenated([run(loaded.instances[0], inputs_of(subject, part)) for part in parts])
    assert list(alone) == list(together)
    for name, rows in alone.items():
        result = together[name].numpy()
        if result.dtype == object:
            assert (result == rows).all()
        else:
            # kernels may add up in another order for another number of rows
            np.testing.assert_allclose(result, rows, rtol=1e-5, atol=1e-6)


def test_inputs_are_neither_written_nor_kept(subject: Subject, loaded: Loaded) -> None:
    datatype = subject.datatype
    memory = bytearray(tensor("", subject.sample(datatype, 3), datatype).host_data())
    before = bytes(memory)
    shape = subject.sample(datatype, 3).shape
    inputs = {subject.input_name: Tensor(subject.input_name, datatype, shape, memoryview(memory).toreadonly())}
    result = run(loaded.instances[0], inputs)[subject.output_name]
    assert bytes(memory) == before
    answer = bytes(result.host_data())
    if datatype is not DataType.BYTES and isinstance(loaded.instances[0], TensorInstance):
        memory[:] = bytes(len(memory))
        assert bytes(result.host_data()) == answer


def test_outputs_come_as_asked_for_and_unknown_ones_are_refused(subject: Subject, loaded: Loaded) -> None:
    assert list(run(loaded.instances[0], sample(subject), [subject.output_name])) == [subject.output_name]


def test_instances_run_side_by_side(subject: Subject, tmp_path: Path) -> None:
    model = load(subject.backend(), tmp_path, subject.build(tmp_path, subject.datatype), num_instances=3)
    expected = run(model.instances[0], sample(subject))[subject.output_name]
    wrong: list[Any] = []

    def work(index: int) -> None:
        for _ in range(5):
            result = run(model.instances[index], sample(subject))[subject.output_name]
            if bytes(result.host_data()) != bytes(expected.host_data()):
                wrong.append(result)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    model.close()


# --- giving back ---------------------------------------------------------------------------------------


def test_closing_gives_memory_and_threads_back(subject: Subject, tmp_path: Path) -> None:
    num_bytes = 8 << 20
    text = subject.build_heavy(tmp_path, num_bytes)
    backend, process = subject.backend(), psutil.Process()

    def cycle() -> None:
        model = load(backend, tmp_path, text)
        run(model.instances[0], inputs_of(subject, subject.sample(subject.datatype, 1)))
        model.close()
        del model
        gc.collect()

    for _ in range(3):  # allocators and caches fill up
        cycle()
    resident, num_threads = process.memory_info().rss, process.num_threads()
    for _ in range(10):
        cycle()
    assert process.memory_info().rss - resident < 3 * num_bytes, "what ten cycles leaked would be ten times the weights"
    assert process.num_threads() <= num_threads


def test_documented_backend_is_short() -> None:
    code = documented_code().strip().splitlines()
    assert len([line for line in code if line.strip()]) <= 60
