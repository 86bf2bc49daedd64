"""The engine process's side of the live view: step traces in, about ten updates a second out.

A :class:`LiveFeed` observes the engine while there are viewers. An update lists the steps since the last update, and the
state of blocks, tables and queues after the newest step. Its JSON values are made of
:class:`~pagebrain.engine.trace.StepTrace` alone.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from pagebrain.engine.trace import EngineStats, StepTrace

MAX_STEPS = 100
"""Most steps listed in an update. If there are more, the oldest are only counted."""

MAX_NEXT_FREE = 32
"""Most free blocks that an update lists; the block that is allocated next comes first."""

INTERVAL_S = 0.1
"""Shortest time between two updates."""


class LiveFeed:
    """Collects traces and makes updates of them.

    Attributes:
        has_news: whether something was observed since the last update.
    """

    def __init__(self) -> None:
        self.has_news = False
        self._steps: deque[dict[str, Any]] = deque(maxlen=MAX_STEPS)
        self._num_skipped = 0
        self._newest: StepTrace | None = None
        self._context: dict[int, int] = {}
        self._requests: dict[int, tuple[str, int]] = {}
        self._preempted: set[int] = set()
        self._due_s = 0.0

    def __call__(self, trace: StepTrace) -> None:
        """Observe a finished step, or a snapshot, which has no rows."""
        self.has_news = True
        self._newest = trace
        self._preempted = {seq_id for seq_id in self._preempted.union(trace.preempted) if seq_id in trace.waiting}
        for row in trace.rows:
            self._context[row.seq_id] = row.context_len
            self._requests[row.seq_id] = (row.request_id, row.sample_index)
        if trace.rows:
            self._num_skipped += len(self._steps) == MAX_STEPS
            self._steps.append(_step(trace))

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until the next update may be sent; ``None`` if there is no news."""
        return max(0.0, self._due_s - now_s) if self.has_news else None

    def update(self, now_s: float, stats: EngineStats, paused: bool) -> dict[str, Any]:
        """The changes since the last update, as JSON values."""
        assert self._newest is not None
        update = {
            "time_s": now_s,
            "paused": paused,
            "steps": list(self._steps),
            "skipped": self._num_skipped,
            "state": self._state(self._newest),
            "totals": {
                "steps": stats.num_steps,
                "prefill_tokens": stats.num_prefill_tokens,
                "decode_tokens": stats.num_decode_tokens,
                "preemptions": stats.num_preemptions,
            },
        }
        self._steps.clear()
        self._num_skipped = 0
        self.has_news = False
        self._due_s = now_s + INTERVAL_S
        return update

    def _state(self, trace: StepTrace) -> dict[str, Any]:
        """The state after the step. Sequences that finished in it hold no blocks any more."""
        tables = {seq_id: blocks for seq_id, blocks in trace.block_tables.items() if seq_id not in trace.finished}
        held = _holders(tables)
        released = [block for seq_id in trace.finished for block in trace.block_tables.get(seq_id, ()) if block not in held]
        waiting = [seq_id for seq_id in trace.waiting if seq_id not in trace.finished]
        known = {*tables, *waiting}
        self._context = {seq_id: length for seq_id, length in self._context.items() if seq_id in tables}
        self._requests = {seq_id: names for seq_id, names in self._requests.items() if seq_id in known}
        return {
            "step": trace.step,
            "free_blocks": len(trace.free_blocks) + len(set(released)),
            "next_free": list(trace.free_blocks[:MAX_NEXT_FREE]),
            "tables": {str(seq_id): list(blocks) for seq_id, blocks in tables.items()},
            "shared": {str(block): count for block, count in held.items() if count > 1},
            "waiting": waiting,
            "running": [seq_id for seq_id in trace.running if seq_id not in trace.finished],
            "preempted": [seq_id for seq_id in waiting if seq_id in self._preempted],
            "context": {str(seq_id): length for seq_id, length in self._context.items()},
            "requests": {str(seq_id): list(names) for seq_id, names in self._requests.items()},
        }


def _step(trace: StepTrace) -> dict[str, Any]:
    num_decode_tokens = sum(row.num_tokens for row in trace.rows if row.phase == "decode")
    return {
        "step": trace.step,
        "launched_s": trace.launched_s,
        "ms": 1000 * (trace.read_s - trace.launched_s),
        "prefill_tokens": trace.num_tokens - num_decode_tokens,
        "decode_tokens": num_decode_tokens,
        "rows": [[row.seq_id, row.start, row.num_tokens, int(row.phase == "decode")] for row in trace.rows],
        "preempted": list(trace.preempted),
        "finished": list(trace.finished),
    }


def _holders(tables: Mapping[int, tuple[int, ...]]) -> dict[int, int]:
    """Block id -> number of tables that hold it."""
    holders: dict[int, int] = {}
    for blocks in tables.values():
        for block in blocks:
            holders[block] = holders.get(block, 0) + 1
    return holders
