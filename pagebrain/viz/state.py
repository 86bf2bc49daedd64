"""Memory and activity of sequences, as numbers computed from step traces. No drawing.

A trace has the block tables at the launch of its step, and the number of tokens that each sequence of the step has in the
cache after it. A sequence that holds blocks and is not in the step keeps the length from an earlier trace.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pagebrain.engine.trace import StepTrace

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
    """For each trace, the tokens in the cache after its step, for every sequence that holds blocks and has a known length.

    The length is unknown only if a sequence held blocks before the first trace and is in no step since.
    """
    history: list[dict[int, int]] = []
    known: dict[int, int] = {}
    for trace in traces:
        known = {seq_id: length for seq_id, length in known.items() if seq_id in trace.block_tables}
        known |= {row.seq_id: row.context_len for row in trace.rows}
        history.append(dict(known))
    return history


def holders(trace: StepTrace) -> dict[int, tuple[int, ...]]:
    """Block id -> ids of the sequences that hold it, ascending. Free blocks are left out."""
    held: dict[int, tuple[int, ...]] = {}
    for seq_id in sorted(trace.block_tables):
        for block_id in trace.block_tables[seq_id]:
            held[block_id] = (*held.get(block_id, ()), seq_id)
    return held


def block_fill(trace: StepTrace, lengths: Mapping[int, int] | None = None) -> dict[int, int]:
    """Block id -> slots with a token after the step, for every block in use.

    ``lengths`` is the step's entry of :func:`cached_lengths`; the default is computed from this trace alone. The blocks of a
    sequence of unknown length count as full.
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
    """Token slots of the pool at one step: ``reserved`` in held blocks, and ``used`` with a token."""

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
    """Share of the reserved slots without a token, over all steps; 0 if no slot was reserved."""
    reserved = sum(point.reserved for point in points)
    return 1 - sum(point.used for point in points) / reserved if reserved else 0.0


@dataclass(frozen=True)
class Mark:
    """The state of a sequence in one step.

    ``num_tokens`` is 0 except for ``prefill`` and ``decode``. ``idle``: it is running but not in this step. ``preempted``:
    it lost its blocks when the step was planned. ``ends``: it finished with this step.
    """

    kind: MarkKind
    num_tokens: int = 0
    ends: bool = False


def marks(traces: Iterable[StepTrace]) -> dict[int, dict[int, Mark]]:
    """Sequence id -> index of the trace -> its mark. There is no entry before a sequence came and after it ended."""
    grid: dict[int, dict[int, Mark]] = {}
    for index, trace in enumerate(traces):
        seen: dict[int, Mark] = {seq_id: Mark("idle") for seq_id in trace.running}
        seen |= {seq_id: Mark("waiting") for seq_id in trace.waiting}
        seen |= {seq_id: Mark("preempted") for seq_id in trace.preempted}
        seen |= {row.seq_id: Mark(row.phase, row.num_tokens, row.seq_id in trace.finished) for row in trace.rows}
        for seq_id, mark in seen.items():
            grid.setdefault(seq_id, {})[index] = mark
    return dict(sorted(grid.items()))
