"""Which texts run together."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from enginehouse_backends.transformers_task.bucketing import group_by_length

LENGTHS = st.lists(st.integers(1, 40), max_size=9)


def cost(lengths: list[int], groups: list[list[int]], call_cost: int) -> int:
    return sum(max(lengths[index] for index in group) * len(group) + call_cost for group in groups)


def best_cost(lengths: list[int], call_cost: int) -> int:
    """Over every way to cut the sorted lengths."""
    ordered = sorted(range(len(lengths)), key=lengths.__getitem__)
    ways = []
    for num_cuts in range(len(ordered)):
        for cuts in combinations(range(1, len(ordered)), num_cuts):
            bounds = [0, *cuts, len(ordered)]
            groups = [ordered[start:stop] for start, stop in pairwise(bounds)]
            ways.append(cost(lengths, groups, call_cost))
    return min(ways, default=0)


def test_equal_lengths_run_together() -> None:
    assert group_by_length([7, 7, 7]) == [[0, 1, 2]]


def test_one_long_text_does_not_pad_the_short_ones() -> None:
    assert group_by_length([5, 500, 6, 5]) == [[0, 3, 2], [1]]


def test_no_text_makes_no_group() -> None:
    assert group_by_length([]) == []


@given(LENGTHS, st.integers(0, 30))
def test_every_text_runs_once_and_no_partition_is_cheaper(lengths: list[int], call_cost: int) -> None:
    groups = group_by_length(lengths, call_cost)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert cost(lengths, groups, call_cost) == best_cost(lengths, call_cost)


@given(LENGTHS, st.integers(1, 60))
def test_no_group_of_several_is_larger_than_allowed(lengths: list[int], max_tokens: int) -> None:
    for group in group_by_length(lengths, max_tokens=max_tokens):
        assert len(group) == 1 or max(lengths[index] for index in group) * len(group) <= max_tokens
