"""The ledger adds up, refuses with the numbers, and forgets what has gone."""

from __future__ import annotations

import pytest

from enginehouse.errors import ResourceExhausted
from enginehouse.execution.contract import MemoryEntry
from enginehouse.execution.ledger import Ledger

GIB = 1 << 30


def entry(model: str, num_bytes: int, device: str = "cuda:0", kind: str = "weights") -> MemoryEntry:
    return MemoryEntry(model, 1, device, kind, num_bytes)


def test_what_is_booked_is_no_longer_free() -> None:
    ledger = Ledger({"cuda:0": 10 * GIB, "cuda:1": 10 * GIB}, {"cuda:0": 8 * GIB})
    ledger.book([entry("a", 3 * GIB), entry("a", GIB, kind="workspace"), entry("a", GIB, "cuda:1")])
    assert (ledger.free_bytes("cuda:0"), ledger.free_bytes("cuda:1")) == (4 * GIB, 9 * GIB)


def test_a_refusal_names_what_is_needed_what_is_free_and_who_holds_the_rest() -> None:
    ledger = Ledger({"cuda:0": 8 * GIB})
    ledger.book([entry("big", 5 * GIB)])
    ledger.book([entry("small", GIB)])
    with pytest.raises(ResourceExhausted) as refusal:
        ledger.book([entry("new", 2 * GIB), entry("new", GIB, kind="kv")])
    assert str(refusal.value) == (
        "model 'new' needs 3.00 GiB on cuda:0, 2.00 GiB of 8.00 GiB are free (held by big 5.00 GiB, small 1.00 GiB)"
    )
    assert [e.model for e in ledger.entries()] == ["big", "small"]


def test_missing_bytes_are_those_of_every_device_that_lacks_them() -> None:
    ledger = Ledger({"cuda:0": 2 * GIB, "cpu": 4 * GIB})
    wanted = [entry("a", 3 * GIB), entry("a", GIB, "cpu")]
    assert ledger.missing_bytes(wanted) == {"cuda:0": GIB}


def test_measurements_replace_claims_even_if_they_are_larger() -> None:
    ledger = Ledger({"cuda:0": 4 * GIB})
    booking = ledger.book([entry("a", GIB)])
    ledger.replace(booking, [MemoryEntry("a", 1, "cuda:0", "weights", 5 * GIB, measured=True)])
    assert ledger.free_bytes("cuda:0") == -GIB


def test_a_load_that_grows_is_refused_as_a_new_one_would_be() -> None:
    ledger = Ledger({"cuda:0": 4 * GIB})
    booking = ledger.book([entry("a", 2 * GIB)])
    ledger.extend(booking, [entry("a", GIB, kind="workspace")])
    with pytest.raises(ResourceExhausted, match=r"needs 2\.00 GiB on cuda:0, 1\.00 GiB of 4\.00 GiB are free"):
        ledger.extend(booking, [entry("a", 2 * GIB, kind="workspace")])
    assert ledger.free_bytes("cuda:0") == GIB


def test_the_old_build_of_a_version_takes_nothing_of_the_new_one_with_it() -> None:
    ledger = Ledger({"cuda:0": 4 * GIB})
    old = ledger.book([entry("a", GIB)])
    new = ledger.book([entry("a", 2 * GIB)])
    ledger.replace(new, [MemoryEntry("a", 1, "cuda:0", "weights", 2 * GIB, measured=True)])
    assert ledger.booked_bytes("cuda:0") == 3 * GIB
    ledger.release(old)
    ledger.release(old)
    assert ledger.booked_bytes("cuda:0") == 2 * GIB
