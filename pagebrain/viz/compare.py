"""Two runs of the same requests below each other: which rows of the first one the second does without."""

from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from pagebrain.engine.trace import StepTrace
from pagebrain.viz.picture import Picture
from pagebrain.viz.state import letter, marks
from pagebrain.viz.steps import MAX_SEQUENCES, draw_timeline, timeline_handles
from pagebrain.viz.style import GREY, PAPER, legend_below, new_figure, styled


def computed_tokens(traces: Sequence[StepTrace]) -> dict[int, int]:
    """Sequence id -> the tokens that all its rows computed together."""
    found: dict[int, int] = {}
    for trace in traces:
        for row in trace.rows:
            found[row.seq_id] = found.get(row.seq_id, 0) + row.num_tokens
    return dict(sorted(found.items()))


@styled
def compare_traces(
    before: Sequence[StepTrace],
    after: Sequence[StepTrace],
    titles: tuple[str, str] = ("before", "after"),
    names: Mapping[int, str] | None = None,
) -> Picture:
    """The timelines of two runs of the same requests, below each other, with one axis of steps.

    At the right of a row stands the number of tokens that were computed for the sequence. In the second timeline a dashed
    frame stands where the first run computed a row of the sequence and the second run computes none.

    Args:
        before, after: the traces of the runs, each from its first step on. Sequence ids say which rows belong together.
        titles: a name for each run.
        names: labels beside a sequence's letter.
    """
    runs = (before, after)
    tables = [marks(run) for run in runs]
    all_ids = sorted({seq_id for table in tables for seq_id in table})
    shown = all_ids[:MAX_SEQUENCES]
    num_steps = max(len(before), len(after))
    figure = new_figure(1.6 + 2 * (0.35 + 0.27 * max(1, len(shown))))
    panels = figure.subplots(2, 1, sharex=True)
    counts = [computed_tokens(run) for run in runs]
    for axes, run, table, title, count in zip(panels, runs, tables, titles, counts, strict=True):
        draw_timeline(axes, run, table, shown, names or {}, len(all_ids) - len(shown), num_steps)
        axes.set_title(f"{title}: {_size(run, count)}")
        for row, seq_id in enumerate(shown):
            text = str(count.get(seq_id, 0))
            axes.text(1.005, row, text, va="center", fontsize=9, color=GREY, transform=axes.get_yaxis_transform())
    panels[0].set_xlabel("")
    gone = 0
    for row, seq_id in enumerate(shown):
        here = tables[1].get(seq_id, {})
        for index, mark in tables[0].get(seq_id, {}).items():
            if mark.num_tokens and not (index in here and here[index].num_tokens):
                frame = Rectangle(
                    (index - 0.5, row - 0.42), 1, 0.84, fill=False, edgecolor=GREY, linewidth=1, linestyle="--"
                )
                panels[1].add_patch(frame)
                gone += 1
    handles = timeline_handles([*tables[0].values(), *tables[1].values()], num_steps)
    if gone:
        handles.append(Patch(facecolor=PAPER, edgecolor=GREY, linestyle="--", label=f"a row {titles[0]}, none here"))
    handles.append(Line2D([], [], linestyle="", marker="$n$", color=GREY, label="right: tokens computed"))
    legend_below(figure, handles, columns=min(4, len(handles)))
    return Picture(figure, compare_alt(before, after, titles, gone))


def _size(run: Sequence[StepTrace], count: Mapping[int, int]) -> str:
    return f"{len(run)} steps, {sum(len(trace.rows) for trace in run)} rows, {sum(count.values())} tokens computed"


def compare_alt(before: Sequence[StepTrace], after: Sequence[StepTrace], titles: tuple[str, str], gone: int) -> str:
    """The alt text: the sizes of both runs, and the tokens of each sequence in which they differ."""
    counts = [computed_tokens(run) for run in (before, after)]
    words = [f"Timelines of two runs. {titles[0]}: {_size(before, counts[0])}; {titles[1]}: {_size(after, counts[1])}."]
    words.append(f"{gone} rows of the first run are in no row of the second at the same step.")
    differ = [seq_id for seq_id in sorted({*counts[0], *counts[1]}) if counts[0].get(seq_id, 0) != counts[1].get(seq_id, 0)]
    told = [f"{letter(i)} {counts[0].get(i, 0)} and {counts[1].get(i, 0)}" for i in differ[:8]]
    words.append(f"Tokens computed, first and second run: {', '.join(told)}." if told else "Each sequence computes as much.")
    if len(differ) > 8:
        words.append(f"{len(differ) - 8} more sequences differ.")
    return " ".join(words)
