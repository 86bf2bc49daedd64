"""Records of the engine for observers: a trace of each step, and counts.

Timelines, pictures and live views read :class:`StepTrace`. It copies every block table, so it is made only if there are
observers. Metrics read :class:`EngineStats`, which costs next to nothing and is always kept.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Protocol

from pagebrain.block import BlockManagerPart
from pagebrain.engine.parts import SchedulerPart
from pagebrain.engine.sequence import Phase, SequenceGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TraceRow:
    """One sequence's share of a step: it computed tokens ``start .. start + num_tokens - 1``.

    ``phase`` is explained at :attr:`pagebrain.engine.sequence.ScheduledSequence.phase`.
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
        rows: the computed tokens of each sequence.
        block_tables: sequence id -> its physical block ids at launch, for every sequence that holds blocks.
        free_blocks: ids of the free blocks at launch, in the block manager's order (the engine's: next one first).
        shared_blocks: block id -> number of holders, for the blocks with more than one.
        num_blocks, block_size: size of the pool.
        waiting, running, preempted: sequence ids; ``preempted`` lost their blocks when this step was planned.
        finished: sequence ids that ended with this step's tokens.
        launched_s, read_s: when the step was launched and when its tokens had been read, ``time.monotonic`` seconds.
        schedule_s, launch_s, wait_s, output_s: seconds spent on planning, on preparing and launching, on waiting for the
            tokens, and on detokenizing and finishing.
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
        """The record of a step that has been read now; the sequences ``finished`` ended with it."""
        return replace(self, finished=tuple(finished), read_s=time.monotonic())


@dataclass
class StepTotals:
    """Running totals since some moment.

    Attributes:
        num_steps, num_prefill_tokens, num_decode_tokens: steps launched, and the tokens they computed by phase.
        num_graph_decode_tokens: decode tokens whose step replayed a CUDA graph.
        num_preemptions: how often a sequence lost its blocks.
        prefix_cache_queries, prefix_cache_hits: prompt tokens of the sequences that started with prefix caching, and those
            of them that were in the cache. A sequence that starts again after a preemption does not count, and neither does
            a sample that starts as a fork.
        num_copied_blocks: blocks that were copied for a fork.
        num_swapped_out_blocks, num_swapped_in_blocks: blocks that were copied to the swap space, and back.
        schedule_s, launch_s, wait_s, output_s: seconds of the engine's thread, divided as in :class:`StepTrace`.
    """

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_graph_decode_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_copied_blocks: int = 0
    num_swapped_out_blocks: int = 0
    num_swapped_in_blocks: int = 0
    schedule_s: float = 0.0
    launch_s: float = 0.0
    wait_s: float = 0.0
    output_s: float = 0.0

    @classmethod
    def of(cls, stats: "StepTotals") -> "StepTotals":
        """The totals of a derived class, such as :class:`EngineStats`, without its other fields."""
        return cls(**{field.name: getattr(stats, field.name) for field in fields(cls)})

    def since(self, earlier: "StepTotals") -> "StepTotals":
        """The difference to ``earlier`` totals."""
        names = [field.name for field in fields(StepTotals)]
        return StepTotals(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    def __add__(self, other: "StepTotals") -> "StepTotals":
        names = [field.name for field in fields(StepTotals)]
        return StepTotals(**{name: getattr(self, name) + getattr(other, name) for name in names})

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
    """The engine's totals since the start, its queues and its pool.

    Attributes:
        num_waiting, num_running: sequences now; preempted sequences wait.
        num_free_blocks, num_blocks: the pool now.
        num_cached_blocks: blocks now whose content the prefix cache can find, free or held.
        num_evicted_blocks: how often such a block lost its content since the start, because its memory was needed.
        num_swapped: sequences now whose K and V are in the swap space.
        swap_block_bytes: bytes of a block in the swap space; 0 without one.
        last_step_tokens: tokens of each step since the last report; the engine leaves it empty, the server fills it.
    """

    num_waiting: int = 0
    num_running: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_cached_blocks: int = 0
    num_evicted_blocks: int = 0
    num_swapped: int = 0
    swap_block_bytes: int = 0
    last_step_tokens: tuple[int, ...] = ()


Observer = Callable[[StepTrace], None]
"""Called with a step's trace when its tokens have been read."""


def tell_observers(observers: list[Observer], trace: StepTrace) -> None:
    """Call each observer. One that fails is removed: the tokens of the step must reach their requests."""
    for observer in list(observers):
        try:
            observer(trace)
        except Exception:
            logger.exception("an observer failed and is not called again")
            observers.remove(observer)


class TracedCache(Protocol):
    """What a trace reads of a paged cache: the engine's or that of chapter 02."""

    @property
    def block_size(self) -> int: ...
    @property
    def block_manager(self) -> BlockManagerPart: ...
    @property
    def seq_ids(self) -> tuple[int, ...]: ...
    def block_table(self, seq_id: int) -> tuple[int, ...]: ...


def trace_cache(step: int, rows: Iterable[TraceRow], cache: TracedCache) -> StepTrace:
    """The record of a step that is launched now and computes ``rows``, without the scheduler's queues."""
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
    """The record of a step that is launched now, without its times and the sequences that end with it."""
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
