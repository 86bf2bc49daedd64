"""Pictures for terminals: rich renderables, made from the same traces, for ``Console().print``.

Letters and characters carry all the information, so a terminal without colours is enough.
"""

from collections.abc import Callable, Mapping, Sequence

from rich.console import Group
from rich.text import Text

from pagebrain.engine.trace import StepTrace
from pagebrain.viz.state import Mark, MarkKind, holders, letter, marks

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
"""The colours of sequences, in turn; a terminal has no more that can be distinguished."""

FREE, SHARED = ".", "*"

_SYMBOLS: dict[MarkKind, tuple[str, str]] = {
    "prefill": ("#", "bold"),
    "decode": ("=", ""),
    "waiting": ("w", "dim"),
    "idle": ("-", "dim"),
    "preempted": ("x", "bold red"),
}


def colour(number: int) -> str:
    """The colour of sequence ``number``."""
    return COLOURS[number % len(COLOURS)]


def pool_map(trace: StepTrace, columns: int = 32, number_of: Callable[[int], int] = int, title: str | None = None) -> Group:
    """Every physical block: the letter of its holder, ``*`` for several holders, ``.`` for a free block.

    ``number_of`` maps a sequence id to the number that determines its letter and colour; by default the id itself.
    """
    held = holders(trace)
    if title is None:
        title = f"The pool at step {trace.step}, {len(held)} of {trace.num_blocks} blocks in use (. is free):"
    lines = [Text(title)]
    for first in range(0, trace.num_blocks, columns):
        line = Text()
        for block_id in range(first, min(first + columns, trace.num_blocks)):
            owners = held.get(block_id, ())
            if not owners:
                line.append(f"{FREE} ", style="dim")
            elif len(owners) > 1:
                line.append(f"{SHARED} ", style="bold")
            else:
                line.append(f"{letter(number_of(owners[0]))} ", style=colour(number_of(owners[0])))
        lines.append(line)
    return Group(*lines)


def block_table(table: Sequence[int], title: str = "", style: str = COLOURS[0], columns: int = 16) -> Group:
    """Logical block numbers above physical ones, in lines of ``columns``."""
    lines = [Text(title)] if title else []
    for first in range(0, len(table), columns):
        chunk = table[first : first + columns]
        logical = "".join(f"{first + index:4d}" for index in range(len(chunk)))
        lines.append(Text("logical  ", style="dim").append(logical, style="dim"))
        lines.append(Text("physical ").append("".join(f"{block_id:4d}" for block_id in chunk), style=style))
    return Group(*lines)


def block_tables(trace: StepTrace) -> Group:
    """The block table of every sequence that holds blocks."""
    tables = sorted(trace.block_tables.items())
    return Group(
        *(block_table(table, f"Block table of sequence {letter(seq_id)}:", colour(seq_id)) for seq_id, table in tables)
    )


def reservation_bars(used: int, reserved: int, block_bytes: int, bar_width: int = 40, style: str = COLOURS[0]) -> Group:
    """Two bars: the blocks that a sequence holds, and the blocks that a contiguous cache reserves for it."""
    lines = []
    for name, blocks, bar_style in (("paged", used, style), ("contiguous", reserved, "dim")):
        size = f"{blocks:3d} blocks {blocks * block_bytes / 1024:7,.0f} KiB"
        bar = max(1, round(bar_width * blocks / reserved)) * "#"
        lines.append(Text(f"{name:<11}").append(f"{bar:<{bar_width}} ", style=bar_style).append(size))
    return Group(*lines)


def timeline(traces: Sequence[StepTrace], columns: int = 60, names: Mapping[int, str] | None = None) -> Group:
    """A line for each sequence, a character for each step, in pieces of ``columns`` steps.

    ``#`` is a prefill chunk, ``=`` a decode, ``w`` waiting, ``-`` not in the step, ``x`` preempted, ``|`` after the end.
    """
    rows = marks(traces)
    titles = {seq_id: " ".join(filter(None, (letter(seq_id), (names or {}).get(seq_id)))) for seq_id in rows}
    width = max(map(len, titles.values()), default=1)
    lines = [Text("# prefill  = decode  w waiting  - not in the step  x preempted  | end", style="dim")]
    for first in range(0, len(traces), columns):
        steps = range(first, min(first + columns, len(traces)))
        ruler = "".join(f"{traces[index].step:<10d}" for index in steps if index % 10 == first % 10)
        lines.append(Text(f"{'':{width}} {ruler}".rstrip(), style="dim"))
        for seq_id, row in rows.items():
            line = Text(f"{titles[seq_id]:<{width}} ", style=colour(seq_id))
            for index in steps:
                _append(line, row.get(index), row.get(index - 1), colour(seq_id))
            last = row.get(steps[-1])
            if last is not None and last.ends:  # the end after the last step of this piece
                line.append("|", style="bold")
            lines.append(line)
    return Group(*lines)


def _append(line: Text, mark: Mark | None, before: Mark | None, style: str) -> None:
    """Append the character of one step."""
    if mark is not None:
        symbol, own = _SYMBOLS[mark.kind]
        line.append(symbol, style=own or style)
    else:
        line.append("|" if before is not None and before.ends else " ", style="bold")
