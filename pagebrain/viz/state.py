"""What step traces say about memory and about who ran when, as plain numbers. No drawing.

A trace has the block tables at the moment when its step was launched, and how many tokens each sequence of the step has in
the cache once it is done. One that holds blocks without being in the step keeps the length that an earlier trace told.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pagebrain.engine.trace import StepTrace, TraceRow

MarkKind = Literal["prefill", "decode", "waiting", "idle", "preempted"]


def letter(seq_id: int) -> str:
    """A short name for a sequence, the same in every picture: A to Z, then AA, AB and so on."""
    name = ""
    number = seq_id + 1
    while number > 0:
        number, digit = divmod(number - 1, 26)
        name = chr(ord("A") + digit) + name
    return name


def cached_lengths(traces: Iterable[StepTrace]) -> list[dict[int, int]]:
    """For each trace, the tokens in the cache after its step, of every sequence that holds blocks and whose length is known.

    Not known is only the length of a sequence that held blocks before the first trace and is in no step since.
    """
    history: list[dict[int, int]] = []
    known: dict[int, int] = {}
    for trace in traces:
        known = {seq_id: length for seq_id, length in known.items() if seq_id in trace.block_tables}
        known |= {row.seq_id: row.context_len for row in trace.rows}
        history.append(dict(known))
    return history


def holders(trace: StepTrace) -> dict[int, tuple[int, ...]]:
    """Block id -> the sequences that hold it, in order of their ids; free blocks are left out."""
    held: dict[int, tuple[int, ...]] = {}
    for seq_id in sorted(trace.block_tables):
        for block_id in trace.block_tables[seq_id]:
            held[block_id] = (*held.get(block_id, ()), seq_id)
    return held


def block_fill(trace: StepTrace, lengths: Mapping[int, int] | None = None) -> dict[int, int]:
    """Block id -> slots that hold a token after the step, of every block in use.

    ``lengths`` is the step's entry of :func:`cached_lengths`; without it the trace's own rows are all that is known. The
    blocks of a sequence of unknown length count as full.
    """
    if lengths is None:
        lengths = cached_lengths([trace])[0]
    size = trace.block_size
    fill: dict[int, int] = {}
    for seq_id, table in trace.block_tables.items():
        length = lengths.get(seq_id, len(table) * size)
        for index, block_id in enumerate(table):
            fill[block_id] = max(fill.get(block_id, 0), min(size, max(0, length - index * size)))
    return fill


class Memory(NamedTuple):
    """Token slots of the pool at one step: in blocks that somebody holds, and those of them that hold a token."""

    step: int
    reserved: int
    used: int


def memory(traces: Iterable[StepTrace]) -> list[Memory]:
    """Reserved and used token slots after each step; a shared block counts once."""
    traces = list(traces)
    points = []
    for trace, lengths in zip(traces, cached_lengths(traces), strict=True):
        fill = block_fill(trace, lengths)
        points.append(Memory(trace.step, len(fill) * trace.block_size, sum(fill.values())))
    return points


def mean_waste(points: Sequence[Memory]) -> float:
    """Share of the reserved slots that held no token, over all steps; 0 if nothing was ever reserved."""
    reserved = sum(point.reserved for point in points)
    return 1 - sum(point.used for point in points) / reserved if reserved else 0.0


@dataclass(frozen=True)
class Mark:
    """What a sequence did in one step.

    ``num_tokens`` is 0 unless it computed. ``idle`` means that it runs, but is not in this step; ``preempted`` that its
    blocks were taken when the step was planned. ``ends`` says that it finished with this step.
    """

    kind: MarkKind
    num_tokens: int = 0
    ends: bool = False


def marks(traces: Iterable[StepTrace]) -> dict[int, dict[int, Mark]]:
    """Sequence id -> index of the trace -> what the sequence did; no entry before it came and after it ended."""
    grid: dict[int, dict[int, Mark]] = {}
    for index, trace in enumerate(traces):
        seen: dict[int, Mark] = {seq_id: Mark("idle") for seq_id in trace.running}
        seen |= {seq_id: Mark("waiting") for seq_id in trace.waiting}
        seen |= {seq_id: Mark("preempted") for seq_id in trace.preempted}
        seen |= {row.seq_id: _computed(row, row.seq_id in trace.finished) for row in trace.rows}
        for seq_id, mark in seen.items():
            grid.setdefault(seq_id, {})[index] = mark
    return dict(sorted(grid.items()))


def _computed(row: TraceRow, ends: bool) -> Mark:
    return Mark(row.phase, row.num_tokens, ends)
