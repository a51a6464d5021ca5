"""Restarts back off, too many crashes give up, and hangs and hogs are told from work."""

from __future__ import annotations

import pytest
from google.protobuf import text_format

from enginehouse.config.schema import ModelConfig
from enginehouse.execution.supervision import CrashHistory, SupervisionPolicy, WorkerFacts, reason_to_kill

POLICY = SupervisionPolicy(max_restarts=3, window_s=10.0, backoff_initial_s=0.1, backoff_max_s=0.3)


def test_each_crash_doubles_the_delay_up_to_the_limit() -> None:
    history = CrashHistory(POLICY)
    assert [history.restart_delay_s(now) for now in (0.0, 1.0, 2.0)] == [0.1, 0.2, 0.3]
    assert history.num_restarts == 3


def test_one_crash_too_many_in_the_window_gives_up() -> None:
    history = CrashHistory(POLICY)
    delays = [history.restart_delay_s(now) for now in (0.0, 1.0, 2.0, 3.0)]
    assert delays[-1] is None
    assert history.surrender_text("fell over") == "gave up after 4 crashes within 10 s; the last: fell over"


def test_crashes_that_left_the_window_are_forgotten() -> None:
    history = CrashHistory(POLICY)
    assert [history.restart_delay_s(now) for now in (0.0, 1.0, 2.0, 30.0, 60.0)] == [0.1, 0.2, 0.3, 0.1, 0.1]


def test_the_config_overrides_what_the_server_says() -> None:
    config = text_format.Parse(
        "serving { supervision { max_restarts: 9 hang_timeout_s: 4 } memory { host_limit_bytes: 77 } }", ModelConfig()
    )
    policy = SupervisionPolicy.of_config(config, POLICY)
    assert (policy.max_restarts, policy.window_s, policy.hang_timeout_s, policy.host_limit_bytes) == (9, 10.0, 4.0, 77)


@pytest.mark.parametrize(
    ("facts", "policy", "reason"),
    [
        (WorkerFacts(), SupervisionPolicy(hang_timeout_s=5), ""),
        (WorkerFacts(oldest_batch_since_s=96.0), SupervisionPolicy(hang_timeout_s=5), ""),
        (WorkerFacts(oldest_batch_since_s=0.0), SupervisionPolicy(), ""),
        (
            WorkerFacts(oldest_batch_since_s=95.0),
            SupervisionPolicy(hang_timeout_s=5),
            "made no progress for 5.0 s, its limit is 5 s",
        ),
        (WorkerFacts(stopped_since_s=98.0), SupervisionPolicy(), ""),
        (
            WorkerFacts(stopped_since_s=95.0),
            SupervisionPolicy(),
            "was stopped (SIGSTOP) and made no progress for 5.0 s",
        ),
        (WorkerFacts(memory_bytes=1 << 30), SupervisionPolicy(), ""),
        (
            WorkerFacts(memory_bytes=3 << 30),
            SupervisionPolicy(host_limit_bytes=2 << 30),
            "used 3.00 GiB of memory, its limit is 2.00 GiB",
        ),
    ],
)
def test_reasons_to_kill(facts: WorkerFacts, policy: SupervisionPolicy, reason: str) -> None:
    assert reason_to_kill(facts, policy, now_s=100.0) == reason
