"""The lock around the kernels' threads: who wants it again at once doesn't keep the others out."""

from __future__ import annotations

import threading

from enginehouse_backends.llm.kernels.library import Turns


def test_a_model_that_is_packed_lets_one_that_waits_step_first() -> None:
    turns, history = Turns(), list[str]()
    asking = threading.Event()

    def step() -> None:
        asking.set()
        with turns:
            history.append("step")

    stepping = threading.Thread(target=step)
    with turns:
        history.append("pack")
        stepping.start()
        asking.wait()
        while not turns._next.locked():
            pass  # it is about to wait
    with turns:
        history.append("pack")
    stepping.join()
    assert history == ["pack", "step", "pack"]
