"""Pictures over the steps: memory held against memory used, and the timeline of sequences."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from pagebrain.engine.trace import StepTrace
from pagebrain.viz.picture import Picture
from pagebrain.viz.state import Mark, MarkKind, Memory, letter, marks, mean_waste, memory
from pagebrain.viz.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    PAPER,
    SKY,
    VERMILLION,
    grid,
    legend_below,
    new_figure,
    styled,
    tint,
)

MAX_SEQUENCES = 24
"""Most rows of a timeline; a note gives the number of the others."""

MAX_NUMBERED = 52
"""Most steps of a timeline with numbers in its boxes. In narrow boxes they are turned by 90 degrees."""

_WASTE: dict[str, Any] = {"facecolor": tint(ORANGE, 0.45), "edgecolor": GREY, "hatch": "////", "linewidth": 0}


@styled
def memory_over_time(traces: Sequence[StepTrace] | Mapping[str, Sequence[StepTrace]]) -> Picture:
    """Token slots held against token slots used, after every step. The difference is waste.

    All slots of held blocks are held; those with a token are used. A mapping from names to traces draws a panel for each
    run, all to the same scale.
    """
    runs = dict(traces) if isinstance(traces, Mapping) else {"": traces}
    points = {name: memory(run) for name, run in runs.items()}
    figure = new_figure(2.6 if len(runs) == 1 else 0.6 + 1.75 * len(runs))
    panels = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    most = max((point.reserved for run in points.values() for point in run), default=1)
    top = most
    for axes, (name, run) in zip(panels, points.items()):
        _draw_memory(axes, run)
        waste = f"{mean_waste(run):.0%} of what is held lies empty"
        axes.set_title(f"{name}: {waste}" if name else waste[0].upper() + waste[1:])
        axes.set_ylabel("token slots")
        capacity = max((trace.num_blocks * trace.block_size for trace in runs[name]), default=0)
        if most < capacity <= 2 * most:
            top = max(top, capacity)
            axes.axhline(capacity, color=GREY, linestyle=":", linewidth=1.2)
            axes.text(0.99, capacity, "pool", ha="right", va="bottom", color=GREY, transform=axes.get_yaxis_transform())
    panels[-1].set_ylim(0, 1.12 * top)
    numbers = [point.step for run in points.values() for point in run] or [0]
    panels[-1].set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    panels[-1].set_xlabel("step")
    handles: list[Any] = [
        Line2D([], [], color=INK, linewidth=1.8, label="held"),
        Patch(**_WASTE, label="held, empty"),
        Patch(facecolor=BLUE, label="used"),
    ]
    legend_below(figure, handles)
    return Picture(figure, " ".join(memory_alt(name, run) for name, run in points.items()))


def _draw_memory(axes: Axes, points: Sequence[Memory]) -> None:
    """Draw areas with a constant value over the width of each step."""
    edges = [point.step - 0.5 for point in points] + [point.step + 0.5 for point in points[-1:]]
    reserved = [point.reserved for point in points]
    used = [point.used for point in points]
    grid(axes)
    if not points:
        return
    axes.stairs(reserved, edges, baseline=used, fill=True, **_WASTE)
    axes.stairs(used, edges, fill=True, facecolor=BLUE, linewidth=0)
    axes.stairs(reserved, edges, color=INK, linewidth=1.8, baseline=None)
    axes.locator_params(axis="x", integer=True)


def memory_alt(name: str, points: Sequence[Memory]) -> str:
    """The alt text of one run's memory."""
    if not points:
        return f"{name}: no steps.".removeprefix(": ")
    peak = max(points, key=lambda point: point.reserved)
    words = f"over {len(points)} steps up to {peak.reserved} token slots were held, when {peak.used} were used;"
    words += f" of all that was held {mean_waste(points):.0%} lay empty."
    return f"{name}: {words}" if name else words[0].upper() + words[1:]


_LOOK: dict[MarkKind, dict[str, Any]] = {
    "prefill": {"facecolor": BLUE, "edgecolor": PAPER, "linewidth": 0.6},
    "decode": {"facecolor": SKY, "edgecolor": PAPER, "linewidth": 0.6},
    "waiting": {"facecolor": PALE, "edgecolor": GREY, "linewidth": 0, "hatch": "...."},
    "idle": {"facecolor": PAPER, "edgecolor": GREY, "linewidth": 0.8},
    "preempted": {"facecolor": "#F7C9B0", "edgecolor": VERMILLION, "linewidth": 1.2, "hatch": "xxxx"},
}
_HEIGHT: dict[MarkKind, float] = {"prefill": 0.84, "decode": 0.46, "waiting": 0.2, "idle": 0.3, "preempted": 0.84}
_MEANING: dict[MarkKind, str] = {
    "prefill": "prefill (tokens)",
    "decode": "decode",
    "waiting": "waiting",
    "idle": "not in the step",
    "preempted": "preempted",
}


@styled
def timeline(traces: Sequence[StepTrace], names: Mapping[int, str] | None = None) -> Picture:
    """A row for each sequence, a column for each step.

    A tall box is a prefill chunk with its number of tokens, a low one a decode, a dotted line waiting, a crossed box a
    preemption, a black bar the end. Pass a part of the traces to draw a part of a long run.

    Args:
        names: labels beside a sequence's letter.
    """
    rows = marks(traces)
    shown = list(rows)[:MAX_SEQUENCES]
    figure = new_figure(1.3 + (0.32 if len(shown) <= 12 else 0.24) * max(1, len(shown)))
    axes = figure.subplots()
    draw_timeline(axes, traces, rows, shown, names or {}, len(rows) - len(shown), len(traces))
    legend_below(figure, timeline_handles([rows[seq_id] for seq_id in shown], len(traces)))
    return Picture(figure, timeline_alt(traces))


def draw_timeline(
    axes: Axes,
    traces: Sequence[StepTrace],
    rows: Mapping[int, Mapping[int, Mark]],
    shown: list[int],
    names: Mapping[int, str],
    num_hidden: int,
    num_steps: int,
) -> None:
    """Draw the marks of the sequences ``shown``, one below the other, on an axis of ``num_steps`` steps."""
    for kind, look in _LOOK.items():
        boxes = [
            Rectangle((index - 0.5, row - _HEIGHT[kind] / 2), 1, _HEIGHT[kind])
            for row, seq_id in enumerate(shown)
            for index, mark in rows.get(seq_id, {}).items()
            if mark.kind == kind
        ]
        if boxes:
            axes.add_collection(PatchCollection(boxes, **look), autolim=False)
    for row, seq_id in enumerate(shown):
        for index, mark in rows.get(seq_id, {}).items():
            if mark.kind == "prefill" and num_steps <= MAX_NUMBERED:
                turn = 0 if _fits(mark.num_tokens, num_steps) else 90
                axes.text(index, row, str(mark.num_tokens), ha="center", va="center", color=PAPER, fontsize=9, rotation=turn)
            if mark.ends:
                axes.plot([index + 0.5] * 2, [row - 0.42, row + 0.42], color="#000000", linewidth=3, solid_capstyle="butt")
    _timeline_axes(axes, traces, shown, names, num_hidden, num_steps)


def timeline_handles(rows: Sequence[Mapping[int, Mark]], num_steps: int) -> list[Any]:
    """The legend of the marks in ``rows``."""
    kinds = {mark.kind for row in rows for mark in row.values()}
    meaning = _MEANING if num_steps <= MAX_NUMBERED else {**_MEANING, "prefill": "prefill"}
    handles: list[Any] = [Patch(**look, label=meaning[kind]) for kind, look in _LOOK.items() if kind in kinds]
    if any(mark.ends for row in rows for mark in row.values()):
        end: dict[str, Any] = {"color": "#000000", "marker": "|", "linestyle": "", "markersize": 11, "markeredgewidth": 3}
        handles.append(Line2D([], [], **end, label="ends"))
    return handles or [Patch(facecolor=PAPER, label="no steps")]


def _fits(num_tokens: int, num_steps: int) -> bool:
    """Whether a number fits into a box without turning: digits are 6 points wide, the figure about 450."""
    return num_steps * (6 * len(str(num_tokens)) + 1) <= 450


def _timeline_axes(
    axes: Axes, traces: Sequence[StepTrace], shown: list[int], names: Mapping[int, str], hidden: int, num_steps: int
) -> None:
    """Set sequences at the left and step numbers below."""
    axes.set_xlim(-0.6, max(num_steps, 8) - 0.3)
    axes.set_ylim(max(1, len(shown)) - 0.5, -0.55)
    labels = [" ".join(filter(None, (letter(seq_id), names.get(seq_id)))) for seq_id in shown]
    axes.set_yticks(range(len(shown)), labels, fontweight="bold")
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if num_steps <= 25 * step)
    first = traces[0].step if traces else 0
    ticks = [index for index in range(num_steps) if (first + index) % every == 0]
    axes.set_xticks(ticks, [str(first + index) for index in ticks])
    axes.set_xlabel("step" if not hidden else f"step ({hidden} more sequences are not drawn)")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def timeline_alt(traces: Sequence[StepTrace], most: int = 8) -> str:
    """The alt text of the timeline."""
    rows = marks(traces)
    words = [f"Timeline of {len(rows)} sequences over {len(traces)} steps."]
    words += [describe(seq_id, rows[seq_id], traces) for seq_id in list(rows)[:most]]
    if len(rows) > most:
        words.append(f"{len(rows) - most} more sequences.")
    return " ".join(words)


def describe(seq_id: int, row: Mapping[int, Mark], traces: Sequence[StepTrace]) -> str:
    """The alt text of one sequence."""
    chunks = [mark.num_tokens for mark in row.values() if mark.kind == "prefill"]
    decodes = sum(mark.kind == "decode" for mark in row.values())
    waits = sum(mark.kind == "waiting" for mark in row.values())
    taken = [str(traces[index].step) for index, mark in row.items() if mark.kind == "preempted"]
    ends = [str(traces[index].step) for index, mark in row.items() if mark.ends]
    parts = [f"prefill of {' + '.join(map(str, chunks))} tokens"] if chunks else []
    parts += [f"{decodes} decodes"] if decodes else []
    parts += [f"waits in {waits} steps"] if waits else []
    parts += [f"preempted in step {', '.join(taken)}"] if taken else []
    parts += [f"ends in step {ends[-1]}"] if ends else []
    return f"{letter(seq_id)}: {', '.join(parts) or 'nothing computed'}."
