"""Pictures of the physical pool as a map of blocks, and of block tables as rows of block ids."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon, Rectangle

from pagebrain.engine.trace import StepTrace
from pagebrain.viz.picture import Picture
from pagebrain.viz.state import block_fill, cached_lengths, holders, letter
from pagebrain.viz.style import (
    GREY,
    INK,
    PAPER,
    WIDTH,
    legend_below,
    new_figure,
    sequence_colour,
    styled,
    text_colour,
    tint,
)

MAX_ROWS = 16
"""Most sequences whose block tables are drawn; a note gives the number of the others."""

_EMPTY = "////"


@styled
def pool_map(
    trace: StepTrace, columns: int | None = None, lengths: Mapping[int, int] | None = None, title: str | None = None
) -> Picture:
    """The pool when a step was launched, a cell for each block: its holders, and its fill after the step.

    A free block is white. In a held block, slots with tokens are coloured and the others are hatched. A block with several
    holders has a corner in the colour of the second one.

    Args:
        columns: blocks in a line. By default 16, fewer if blocks are long, more if there are very many.
        lengths: tokens cached of each sequence, an entry of :func:`~pagebrain.viz.cached_lengths`. Needed only if a sequence
            holds blocks and is not in the step.
        title: replaces the title that gives the number of blocks in use.
    """
    columns = columns or _default_columns(trace)
    figure = new_figure(_pool_height(trace, columns) + 0.75)
    axes = figure.subplots()
    axes.set_title(title or _pool_title(trace))
    _draw_pool(axes, trace, columns, lengths)
    legend_below(figure, _legend(trace, lengths, with_pool=True))
    return Picture(figure, pool_alt(trace, lengths))


@styled
def block_tables(
    trace: StepTrace,
    lengths: Mapping[int, int] | None = None,
    with_pool: bool = False,
    names: Mapping[int, str] | None = None,
    marked: Collection[int] = (),
) -> Picture:
    """Each sequence's block table when a step was launched: logical blocks from left to right, the physical id in each.

    Args:
        lengths: as in :func:`pool_map`.
        with_pool: draw the pool beneath.
        names: labels beside a sequence's letter.
        marked: ids of physical blocks that get a thick frame.
    """
    shown = sorted(trace.block_tables)[:MAX_ROWS]
    width = max((len(trace.block_tables[seq_id]) for seq_id in shown), default=1)
    tables_height = 0.34 * max(1, len(shown)) + 0.75
    columns = _default_columns(trace)
    pool_height = _pool_height(trace, columns) + 0.4 if with_pool else 0.0
    figure = new_figure(tables_height + pool_height + 0.4)
    if with_pool:
        above, below = figure.subplots(2, 1, height_ratios=(tables_height, pool_height))
        below.set_title(_pool_title(trace))
        _draw_pool(below, trace, columns, lengths)
    else:
        above = figure.subplots()
    when = "" if with_pool else f" at step {trace.step}"  # the pool's title says it
    above.set_title(f"Block tables{when}: logical block above, physical block inside")
    fill = block_fill(trace, lengths)
    held = holders(trace)
    for row, seq_id in enumerate(shown):
        for index, block_id in enumerate(trace.block_tables[seq_id]):
            _draw_block(above, index, row, 0.94, 0.84, held[block_id], fill[block_id] / trace.block_size, seq_id)
            if width <= 24:
                share = fill[block_id] / trace.block_size
                _label(above, index + 0.47, row + 0.42, str(block_id), _ground(seq_id, share), share < 1)
            if block_id in marked:
                frame = Rectangle((index + 0.02, row + 0.02), 0.9, 0.8, fill=False, edgecolor=INK, linewidth=3.2, zorder=6)
                above.add_patch(frame)
    hidden = len(trace.block_tables) - len(shown)
    _table_axes(above, shown, width, names or {}, hidden)
    handles = _legend(trace, lengths, with_pool)
    alt = tables_alt(trace, lengths, with_pool)
    if marked:
        handles.append(Patch(facecolor=PAPER, edgecolor=INK, linewidth=3.2, label="marked"))
        alt += f" Marked blocks: {', '.join(map(str, sorted(marked)))}."
    legend_below(figure, handles)
    return Picture(figure, alt)


def _table_axes(axes: Axes, shown: list[int], width: int, names: Mapping[int, str], hidden: int) -> None:
    """Set logical block numbers on top and sequences at the left."""
    axes.set_xlim(-0.1, max(width, 8))
    axes.set_ylim(max(1, len(shown)), -0.1)
    step = max(1, math.ceil(width / 16))
    axes.set_xticks([index + 0.47 for index in range(0, width, step)], [str(index) for index in range(0, width, step)])
    axes.xaxis.tick_top()
    axes.set_yticks(
        [row + 0.42 for row in range(len(shown))],
        [" ".join(filter(None, (letter(seq_id), names.get(seq_id)))) for seq_id in shown],
        fontweight="bold",
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if hidden:
        axes.set_xlabel(f"and {hidden} more sequences", loc="left")


def _default_columns(trace: StepTrace) -> int:
    """Sixteen short blocks in a line. Long blocks, as in a cache that reserves, are drawn as long bars."""
    if trace.block_size > 32:
        return 1 if trace.num_blocks <= MAX_ROWS else max(1, 256 // trace.block_size)
    return 16 if trace.num_blocks <= 128 else 32 if trace.num_blocks <= 512 else 64


def _pool_height(trace: StepTrace, columns: int) -> float:
    """The pool's height in inches."""
    rows = math.ceil(trace.num_blocks / columns)
    return rows * max(0.12, min(0.4, 0.92 * WIDTH / columns)) + 0.1


def _pool_title(trace: StepTrace) -> str:
    in_use = len(holders(trace))
    return f"Pool at step {trace.step}: {in_use} of {trace.num_blocks} blocks of {_slots(trace)} in use"


def _slots(trace: StepTrace) -> str:
    """The size of a block as text."""
    return f"{trace.block_size} slot{'' if trace.block_size == 1 else 's'}"


def _draw_pool(axes: Axes, trace: StepTrace, columns: int, lengths: Mapping[int, int] | None) -> None:
    """Draw the cells, with block numbers and holders' letters if there is room for them."""
    fill = block_fill(trace, lengths)
    held = holders(trace)
    columns = min(columns, trace.num_blocks)
    for block_id in range(trace.num_blocks):
        row, column = divmod(block_id, columns)
        owners = held.get(block_id, ())
        share = fill.get(block_id, 0) / trace.block_size
        gap = 0.06 if columns > 1 else 0.004
        _draw_block(axes, column, row, 1 - gap, 0.9, owners, share)
        if columns <= 16:
            inset = 0.06 * columns / 16 if columns < 8 else 0.06
            _number(axes, column + inset, row + 0.08, block_id, owners, share if columns >= 8 else round(share + 0.45))
        elif columns == trace.num_blocks <= 32:  # one line of narrow cells
            axes.text(column + 0.47, row + 1.0, str(block_id), ha="center", va="top", fontsize=7, color=GREY)
        if owners and columns <= 32:
            name = "".join(map(letter, owners)) if len(owners) < 3 else f"{letter(owners[0])}+{len(owners) - 1}"
            centre = column + (1 - gap) * (0.5 if len(owners) == 1 else 0.4)
            offset = 0.62 if columns <= 16 else 0.45
            _label(axes, centre, row + offset, name, _ground(owners[0], share), share < 1)
    axes.set_xlim(-0.002 * columns, columns)
    axes.set_ylim(math.ceil(trace.num_blocks / columns), -0.05)
    axes.set_axis_off()


def _draw_block(
    axes: Axes,
    left: float,
    top: float,
    width: float,
    height: float,
    owners: tuple[int, ...],
    share: float,
    main: int | None = None,
) -> None:
    """Draw one cell. ``share`` of it is filled, in the colour of ``main`` or of the first owner."""
    if not owners:
        axes.add_patch(Rectangle((left, top), width, height, facecolor=PAPER, edgecolor="#BBBBBB", linewidth=0.8))
        return
    main = owners[0] if main is None else main
    colour = sequence_colour(main)
    if share < 1:
        axes.add_patch(
            Rectangle((left, top), width, height, facecolor=tint(colour, 0.15), edgecolor=GREY, hatch=_EMPTY, linewidth=0)
        )
    axes.add_patch(Rectangle((left, top), width * share, height, facecolor=colour, linewidth=0))
    if len(owners) > 1:
        other = sequence_colour(next(owner for owner in owners if owner != main))
        right, bottom = left + width, top + height
        corner = [(right, bottom), (right - 0.45 * width, bottom), (right, bottom - 0.7 * height)]
        axes.add_patch(Polygon(corner, facecolor=other, edgecolor=PAPER, linewidth=0.8))
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=INK, linewidth=0.9))


def _ground(seq_id: int, share: float) -> str:
    """The background in the middle of a block that is filled to ``share``."""
    return sequence_colour(seq_id) if share > 0.5 else PAPER


def _label(axes: Axes, x: float, y: float, text: str, ground: str, needs_plate: bool) -> None:
    """Draw text in the middle of a cell, with a background if the cell is hatched."""
    box = {"facecolor": ground, "edgecolor": "none", "pad": 0.8} if needs_plate else None
    axes.text(x, y, text, ha="center", va="center", fontweight="bold", color=text_colour(ground), bbox=box, zorder=5)


def _number(axes: Axes, x: float, y: float, block_id: int, owners: tuple[int, ...], share: float) -> None:
    """Draw a block's number in its corner."""
    ground = _ground(owners[0], share) if owners else PAPER
    box = {"facecolor": ground, "edgecolor": "none", "pad": 0.3} if owners and share < 1 else None
    colour = text_colour(ground) if owners else GREY
    axes.text(x, y, str(block_id), va="top", fontsize=9, color=colour, bbox=box, zorder=4)


def _legend(trace: StepTrace, lengths: Mapping[int, int] | None, with_pool: bool) -> list[Any]:
    """The legend of the marks that are in the picture. Letters explain the colours."""
    fill = block_fill(trace, lengths)
    handles: list[Any] = []
    if any(fill.values()):
        handles.append(Patch(facecolor=sequence_colour(min(trace.block_tables)), edgecolor=INK, label="holds tokens"))
    if any(filled < trace.block_size for filled in fill.values()):
        handles.append(Patch(facecolor=PAPER, edgecolor=GREY, hatch=_EMPTY, label="held, empty"))
    if with_pool and len(holders(trace)) < trace.num_blocks:
        handles.append(Patch(facecolor=PAPER, edgecolor="#BBBBBB", label="free"))
    if trace.shared_blocks:
        corner = [(-1, -1), (1, -1), (1, 1)]
        handles.append(Line2D([], [], marker=corner, linestyle="", color=INK, markersize=9, label="corner: shared"))
    return handles


def pool_alt(trace: StepTrace, lengths: Mapping[int, int] | None = None) -> str:
    """The alt text of the pool."""
    fill = block_fill(trace, lengths)
    words = [
        f"Pool of {trace.num_blocks} blocks of {_slots(trace)} at step {trace.step}:",
        f"{_who_holds(trace)}; {trace.num_blocks - len(fill)} free.",
        f"{sum(fill.values())} of the {len(fill) * trace.block_size} slots in held blocks hold a token.",
    ]
    if trace.shared_blocks:
        shared = ", ".join(f"{block_id} by {count}" for block_id, count in sorted(trace.shared_blocks.items()))
        words.append(f"Shared blocks: {shared} sequences.")
    return " ".join(words)


def tables_alt(trace: StepTrace, lengths: Mapping[int, int] | None = None, with_pool: bool = False) -> str:
    """The alt text of the block tables."""
    if with_pool:
        return f"Block tables above the pool. {pool_alt(trace, lengths)}"
    known = cached_lengths([trace])[0] if lengths is None else lengths
    tokens = ", ".join(f"{letter(seq_id)} {known[seq_id]}" for seq_id in sorted(trace.block_tables) if seq_id in known)
    return f"Block tables at step {trace.step}: {_who_holds(trace)}. Tokens cached: {tokens or 'not known'}."


def _who_holds(trace: StepTrace, most: int = 8) -> str:
    """Each sequence's blocks in logical order, with long lists shortened."""
    parts = []
    for seq_id in sorted(trace.block_tables)[:most]:
        table = trace.block_tables[seq_id]
        ids = ", ".join(map(str, table[:most])) + (f" and {len(table) - most} more" if len(table) > most else "")
        parts.append(f"sequence {letter(seq_id)} holds {'block' if len(table) == 1 else 'blocks'} {ids}")
    hidden = len(trace.block_tables) - most
    if hidden > 0:
        parts.append(f"{hidden} more sequences hold others")
    return "; ".join(parts) or "no block is held"
