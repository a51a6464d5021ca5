"""A short soak: sequences with cancellations, deadlines and dead clients among them (`make soak` is the long one)."""

from __future__ import annotations

import pytest

from tests.faults.soak import soak


@pytest.mark.slow
@pytest.mark.asyncio
async def test_no_answer_is_wrong_and_no_slot_is_lost() -> None:
    told: list[str] = []
    await soak(num_sequences=600, at_once=64, seed=3, report=told.append)
    assert "every slot free" in told[-1]
