"""What to do when a worker dies, hangs or eats memory. Pure: facts and the time in, a decision out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from enginehouse.config.schema import ModelConfig
from enginehouse.execution.ledger import gib


@dataclass(frozen=True, slots=True)
class SupervisionPolicy:
    """When to restart and when to give up. Zero limits are none."""

    max_restarts: int = 5
    window_s: float = 60.0
    backoff_initial_s: float = 0.1
    backoff_max_s: float = 10.0
    hang_timeout_s: float = 0.0
    """A batch that runs longer is a hang. No default: some models work for hours."""
    stopped_timeout_s: float = 5.0
    """A process that the kernel shows as stopped for so long is a hang."""
    start_timeout_s: float = 600.0
    unload_timeout_s: float = 60.0
    """A model that is to go and answers nothing for so long, while it owes answers, is ended."""
    host_limit_bytes: int = 0

    @classmethod
    def of_config(cls, config: ModelConfig, base: SupervisionPolicy | None = None) -> SupervisionPolicy:
        """What the config's `serving` says, over the server's own."""
        base = base or cls()
        said = config.serving.supervision
        return cls(
            said.max_restarts or base.max_restarts,
            said.window_s or base.window_s,
            said.backoff_initial_s or base.backoff_initial_s,
            said.backoff_max_s or base.backoff_max_s,
            said.hang_timeout_s or base.hang_timeout_s,
            base.stopped_timeout_s,
            said.start_timeout_s or base.start_timeout_s,
            said.unload_timeout_s or base.unload_timeout_s,
            config.serving.memory.host_limit_bytes or base.host_limit_bytes,
        )


class CrashHistory:
    """One model's crashes within the window."""

    def __init__(self, policy: SupervisionPolicy) -> None:
        self.policy = policy
        self.num_restarts = 0
        self._crashes_s: deque[float] = deque()

    def restart_delay_s(self, now_s: float) -> float | None:
        """Notes a crash. How long to wait before the restart; None to give up."""
        self._crashes_s.append(now_s)
        while self._crashes_s[0] <= now_s - self.policy.window_s:
            self._crashes_s.popleft()
        count = len(self._crashes_s)
        if count > self.policy.max_restarts:
            return None
        self.num_restarts += 1
        delay_s = self.policy.backoff_initial_s * 2.0 ** (count - 1)
        return min(delay_s, self.policy.backoff_max_s)

    def surrender_text(self, how: str) -> str:
        count = len(self._crashes_s)
        return f"gave up after {count} crashes within {self.policy.window_s:g} s; the last: {how}"


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A reading of one worker. Times are seconds on the monotonic clock."""

    oldest_batch_since_s: float | None = None
    stopped_since_s: float | None = None
    memory_bytes: int = 0


def reason_to_kill(facts: WorkerFacts, policy: SupervisionPolicy, now_s: float) -> str:
    """Why the worker must go, as the end of a sentence about it; "" to leave it alone."""
    if policy.host_limit_bytes and facts.memory_bytes > policy.host_limit_bytes:
        return f"used {gib(facts.memory_bytes)} of memory, its limit is {gib(policy.host_limit_bytes)}"
    stopped_s = now_s - facts.stopped_since_s if facts.stopped_since_s is not None else 0.0
    if policy.stopped_timeout_s and stopped_s >= policy.stopped_timeout_s:
        return f"was stopped (SIGSTOP) and made no progress for {stopped_s:.1f} s"
    running_s = now_s - facts.oldest_batch_since_s if facts.oldest_batch_since_s is not None else 0.0
    if policy.hang_timeout_s and running_s >= policy.hang_timeout_s:
        return f"made no progress for {running_s:.1f} s, its limit is {policy.hang_timeout_s:g} s"
    return ""
