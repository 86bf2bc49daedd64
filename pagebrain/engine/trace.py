"""What the outside sees of the engine: a record of each step for those who watch, and counts that are always kept.

Timelines, pictures and live views read :class:`StepTrace`, which is made only when somebody watches: it copies every block
table. Metrics read :class:`EngineStats`, which costs next to nothing. Nothing else reads the engine's insides.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Protocol

from pagebrain.block import BlockManagerPart
from pagebrain.engine.parts import SchedulerPart
from pagebrain.engine.sequence import Phase, SequenceGroup


@dataclass(frozen=True)
class TraceRow:
    """One sequence's share of a step: it computed tokens ``start .. start + num_tokens - 1``.

    ``phase`` is ``prefill`` while the sequence catches up with tokens that it has, ``decode`` when it extends its text.
    """

    seq_id: int
    request_id: str
    sample_index: int
    start: int
    num_tokens: int
    samples: bool
    phase: Phase = "prefill"

    @property
    def context_len(self) -> int:
        """Tokens of the sequence that are in the cache after the step."""
        return self.start + self.num_tokens


@dataclass(frozen=True)
class StepTrace:
    """One step of the engine.

    Attributes:
        step: counts from 0.
        rows: what was computed.
        block_tables: sequence id -> its physical block ids, of every sequence that holds blocks, when the step was launched.
        free_blocks: ids of the free blocks at that moment, as the block manager lists them (the engine's: next one first).
        shared_blocks: block id -> holders, of the blocks with more than one.
        num_blocks, block_size: the pool.
        waiting, running, preempted: sequence ids; ``preempted`` lost their blocks when this step was planned.
        finished: sequence ids that ended with this step's tokens.
        launched_s, read_s: when the step was launched and when its tokens had been read, ``time.monotonic`` seconds.
        schedule_s, launch_s, wait_s, output_s: seconds spent deciding, preparing and launching, waiting for the tokens,
            and detokenizing and finishing.
    """

    step: int
    rows: tuple[TraceRow, ...]
    block_tables: Mapping[int, tuple[int, ...]]
    free_blocks: tuple[int, ...]
    shared_blocks: Mapping[int, int]
    num_blocks: int
    block_size: int
    waiting: tuple[int, ...] = ()
    running: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    finished: tuple[int, ...] = ()
    launched_s: float = 0.0
    read_s: float = 0.0
    schedule_s: float = 0.0
    launch_s: float = 0.0
    wait_s: float = 0.0
    output_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computed."""
        return sum(row.num_tokens for row in self.rows)

    def read(self, finished: Iterable[int] = ()) -> "StepTrace":
        """The record once the step's tokens have been read, which is now; ``finished`` ended with them."""
        return replace(self, finished=tuple(finished), read_s=time.monotonic())


@dataclass
class StepTotals:
    """Running totals since some moment.

    Attributes:
        num_steps, num_prefill_tokens, num_decode_tokens: steps launched, and tokens they computed by phase.
        num_graph_decode_tokens: those decode tokens whose step replayed a CUDA graph.
        num_preemptions: how often a sequence lost its blocks.
        schedule_s, launch_s, wait_s, output_s: seconds that the engine's thread spent deciding, preparing and launching,
            waiting for tokens, and detokenizing and finishing.
    """

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_graph_decode_tokens: int = 0
    num_preemptions: int = 0
    schedule_s: float = 0.0
    launch_s: float = 0.0
    wait_s: float = 0.0
    output_s: float = 0.0

    @classmethod
    def of(cls, stats: "StepTotals") -> "StepTotals":
        """The totals alone of something that has more, such as :class:`EngineStats`."""
        return cls(**{field.name: getattr(stats, field.name) for field in fields(cls)})

    def since(self, earlier: "StepTotals") -> "StepTotals":
        """What was added since ``earlier``."""
        return StepTotals(**{name: value - getattr(earlier, name) for name, value in vars(self).items()})

    def __add__(self, other: "StepTotals") -> "StepTotals":
        return StepTotals(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def num_tokens(self) -> int:
        """Tokens computed, prefill and decode."""
        return self.num_prefill_tokens + self.num_decode_tokens

    @property
    def graph_share(self) -> float:
        """The share of decode tokens whose step replayed a CUDA graph."""
        return self.num_graph_decode_tokens / self.num_decode_tokens if self.num_decode_tokens else 0.0


@dataclass
class EngineStats(StepTotals):
    """The engine's state in counts: its totals since the start, its queues and its pool.

    Attributes:
        num_waiting, num_running: sequences now; preempted ones wait.
        num_free_blocks, num_blocks: the pool now.
        last_step_tokens: tokens of each step since these were last collected; empty as the engine gives it.
    """

    num_waiting: int = 0
    num_running: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    last_step_tokens: tuple[int, ...] = ()


Observer = Callable[[StepTrace], None]
"""Called with every step's trace once its tokens have been read."""


class TracedCache(Protocol):
    """What a trace needs to know of a paged cache; the engine's has it, and chapter 02's."""

    @property
    def block_size(self) -> int: ...
    @property
    def block_manager(self) -> BlockManagerPart: ...
    @property
    def seq_ids(self) -> tuple[int, ...]: ...
    def block_table(self, seq_id: int) -> tuple[int, ...]: ...


def trace_cache(step: int, rows: Iterable[TraceRow], cache: TracedCache) -> StepTrace:
    """The record of a step that is being launched now and computes ``rows``, as far as the cache tells it: no queues."""
    tables = {seq_id: cache.block_table(seq_id) for seq_id in cache.seq_ids}
    blocks = cache.block_manager
    holders = {block_id: blocks.ref_count(block_id) for table in tables.values() for block_id in table}
    return StepTrace(
        step=step,
        rows=tuple(rows),
        block_tables=MappingProxyType(tables),
        free_blocks=blocks.free_blocks,
        shared_blocks=MappingProxyType({block_id: count for block_id, count in holders.items() if count > 1}),
        num_blocks=blocks.num_blocks,
        block_size=cache.block_size,
        launched_s=time.monotonic(),
    )


def trace_step(step: int, group: SequenceGroup, cache: TracedCache, scheduler: SchedulerPart) -> StepTrace:
    """The record of a step that is being launched, before its times and what ended with it are known."""
    rows = (
        TraceRow(e.seq.seq_id, e.seq.request.request_id, e.seq.sample_index, e.start, e.num_tokens, e.samples, e.phase)
        for e in group
    )
    return replace(
        trace_cache(step, rows, cache),
        waiting=tuple(seq.seq_id for seq in scheduler.waiting),
        running=tuple(seq.seq_id for seq in scheduler.running),
        preempted=tuple(seq.seq_id for seq in group.preempted),
    )
