"""Which program of an attention kernel does what: tiles of prefill, splits of decoding. Pure, no torch.

Prefill gets one program for every few query tokens of a sequence; decoding, whose queries are single tokens,
is split along the cached tokens until the device has enough programs to be busy.
"""

from __future__ import annotations

from collections.abc import Sequence

PADDING_TILE = (-1, 0)
MAX_SPLITS = 64


def rows_per_tile(head_dim: int) -> int:
    """Query rows of a prefill tile: as many as registers hold the results of without spilling."""
    return 128 if head_dim <= 128 else 64


def query_tokens_per_tile(group: int, rows: int) -> int:
    """How many query tokens share a tile of `rows` rows when each brings `group` heads. A power of two."""
    tokens = max(rows // _power_of_two_at_least(group), 1)
    # The matrix units work on 16 rows at the least.
    return max(tokens, 16 // _power_of_two_at_least(group), 1)


def prefill_tiles(query_lens: Sequence[int], tokens_per_tile: int) -> list[tuple[int, int]]:
    """(sequence, first query token) of each tile; long sequences' last tiles, the most work, come first.

    A causal tile costs about as much as the tokens before it, so starting with the latest lets the short
    ones fill the device's end of the launch.
    """
    tiles = [
        (sequence, first)
        for sequence, query_len in enumerate(query_lens)
        for first in range(0, query_len, tokens_per_tile)
    ]
    return sorted(tiles, key=lambda tile: -tile[1])


def num_decode_splits(
    num_sequences: int,
    num_kv_heads: int,
    num_multiprocessors: int,
    max_tiles: int,
    per_unit: int = 2,
) -> int:
    """Splits of each sequence, so that every multiprocessor has `per_unit` programs. A power of two.

    Never more than `max_tiles`, the tiles of the longest context: more splits would all be empty.
    """
    programs = max(num_sequences * num_kv_heads, 1)
    wanted = num_multiprocessors * per_unit // programs
    splits = 1
    while splits * 2 <= min(wanted, max_tiles, MAX_SPLITS):
        splits *= 2
    return splits


def _power_of_two_at_least(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
