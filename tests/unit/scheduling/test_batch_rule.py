"""A function beside the model can decide which requests run together."""

from __future__ import annotations

from pathlib import Path

import pytest

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.scheduling.batch_rule import load_rule

from .factories import Rig, batching_config, rig_of

SAME_COLOUR = """
def same_colour(waiting, max_rows):
    colour = waiting[0].parameters["colour"]
    return [i for i, one in enumerate(waiting) if one.parameters["colour"] == colour][:max_rows]

def patient(waiting, max_rows):
    return 500 if len(waiting) < 3 and waiting[0].waited_us < 1000 else list(range(len(waiting)))

def broken(waiting, max_rows):
    raise KeyError("oops")

def greedy(waiting, max_rows):
    return range(len(waiting))

def nothing(waiting, max_rows):
    return []

number = 5
"""


def ruled_rig(folder: Path, function: str, max_batch_size: int = 4) -> Rig:
    (folder / "rules.py").write_text(SAME_COLOUR)
    return rig_of(ruled_config(f"rules:{function}", max_batch_size), model_directory=folder)


def ruled_config(place: str, max_batch_size: int = 4) -> ModelConfig:
    config = batching_config(max_batch_size=max_batch_size)
    config.serving.batching.rule = place
    return config


def values(rig: Rig) -> list[list[int]]:
    return [[request.inputs["X"].numpy().item() for request in batch] for batch in rig.observer.batches]


def test_the_rule_chooses_who_runs_together(tmp_path: Path) -> None:
    rig = ruled_rig(tmp_path, "same_colour")
    for number, colour in enumerate(("red", "blue", "red", "blue", "red")):
        rig.send(number, parameters={"colour": colour})
    rig.run_all()
    assert values(rig) == [[0, 2, 4], [1, 3]]


def test_the_rule_can_wait(tmp_path: Path) -> None:
    rig = ruled_rig(tmp_path, "patient")
    rig.send(1)
    rig.clock.advance(us=400)
    assert rig.waiting_sizes == []
    rig.clock.advance(us=600)
    assert rig.waiting_sizes == [1]
    rig.run_all()
    for value in (2, 3, 4):
        rig.send(value)
    rig.clock.run_soon()
    assert rig.waiting_sizes == [3]


@pytest.mark.parametrize("function", ["broken", "greedy", "nothing"])
def test_without_a_right_answer_batches_are_made_as_usual(
    function: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = ruled_rig(tmp_path, function, max_batch_size=2)
    for value in range(4):
        rig.send(value)
    rig.run_all()
    assert values(rig) == [[0, 1], [2, 3]]
    assert caplog.text.count("batching without it") == 1


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("rules", 'expected "module:function"'),
        ("none:f", "there is no file"),
        ("rules:nobody", "'rules.py' has no function 'nobody'"),
        ("rules:number", "has no function 'number'"),
        ("raises:f", "ZeroDivisionError"),
    ],
)
def test_a_rule_that_is_not_there_fails_the_load(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(SAME_COLOUR)
    (tmp_path / "raises.py").write_text("1 / 0\n")
    with pytest.raises(InvalidArgument, match=message):
        load_rule(place, tmp_path)
    with pytest.raises(InvalidArgument, match=message):
        rig_of(ruled_config(place), model_directory=tmp_path)
