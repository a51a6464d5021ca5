"""Which texts of a batch run together, so that short ones aren't padded to the longest. Pure.

Running a group costs its padded size, and something for the call itself. The best partition of texts sorted
by length into runs of neighbours is found exactly, by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CALL_COST_TOKENS = 24
"""What a call costs beside its tokens, in tokens. Measured with MiniLM on a CPU: about 1 ms, as much as 24 tokens."""
MAX_GROUP_TOKENS = 16384
"""Padded tokens of one call, so that a batch of long texts doesn't take memory without bound."""


def group_by_length(
    lengths: Sequence[int], call_cost: int = CALL_COST_TOKENS, max_tokens: int = MAX_GROUP_TOKENS
) -> list[list[int]]:
    """Indices of `lengths`, in groups that are to run together; every index once.

    No group is larger than `max_tokens` when padded, unless it is a single text.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    sizes = np.array([lengths[index] for index in order], dtype=np.int64)
    best = np.zeros(len(order) + 1)  # best[n]: the least cost of the n shortest
    start_of = np.zeros(len(order) + 1, dtype=np.int64)  # where the last group of that partition starts
    for end in range(1, len(order) + 1):
        longest = sizes[end - 1]
        most = max(1, int(max_tokens // max(longest, 1)))
        first = max(0, end - most)
        counts = end - np.arange(first, end)
        costs = best[first:end] + longest * counts + call_cost
        chosen = int(np.argmin(costs))
        best[end], start_of[end] = costs[chosen], first + chosen
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = int(start_of[end])
        groups.append(order[start:end])
        end = start
    return groups[::-1]
