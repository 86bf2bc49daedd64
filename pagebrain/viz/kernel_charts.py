"""Charts of kernels: the roofline, and the parts of a context that programs read."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pagebrain.viz.picture import Picture
from pagebrain.viz.style import (
    DARK_COLOURS,
    GREY,
    INK,
    LINES,
    MARKERS,
    grid,
    legend_below,
    new_figure,
    sequence_colour,
    styled,
    text_colour,
)


@styled
def roofline(
    series: Mapping[str, Sequence[tuple[float, float]]], bytes_per_s: float, operations_per_s: float, title: str = ""
) -> Picture:
    """Measured kernels under the roof of a machine, on logarithmic axes; beside it, the share of the roof that each reaches.

    ``series`` maps a label to points ``(operations per byte, operations per second)``. Below the ridge the roof is
    ``bytes_per_s`` times the intensity, beyond it ``operations_per_s``. Points of one intensity stand above one another in
    the first panel. In the second panel each series has a column, with its points from left to right.
    """
    points = [point for group in series.values() for point in group]
    if not points:
        raise ValueError("roofline needs at least one point")
    ridge = operations_per_s / bytes_per_s
    left = min([x for x, _ in points] + [1.0]) / 2
    right = max([x for x, _ in points] + [ridge]) * 3
    figure = new_figure(3.9)
    axes, shares_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([left, ridge, right], [left * bytes_per_s, operations_per_s, operations_per_s], color=INK, linewidth=2.2)
    axes.axvline(ridge, color=GREY, linewidth=1, linestyle=LINES[1])

    def label(text: str, x: float, y: float, offset: tuple[int, int], **look: Any) -> None:
        axes.annotate(text, (x, y), offset, textcoords="offset points", **look)

    middle, arithmetic = math.sqrt(left * ridge), f"arithmetic: {operations_per_s / 1e12:,.0f} T operations/s"
    label(f"memory: {bytes_per_s / 1e12:.2f} TB/s", middle, middle * bytes_per_s, (-8, 6), ha="right")
    label(arithmetic, ridge, operations_per_s, (-8, 5), ha="right")
    label(f"ridge: {ridge:.0f}", ridge, left * bytes_per_s, (-5, 3), color=GREY, va="bottom", ha="right")
    handles = []
    for index, (name, group) in enumerate(series.items()):
        look: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "color": DARK_COLOURS[index % len(DARK_COLOURS)]}
        axes.plot([x for x, _ in group], [y for _, y in group], linestyle="", markeredgecolor=INK, markersize=7, **look)
        handles.append(Line2D([], [], linestyle="", markeredgecolor=INK, markersize=7, label=name, **look))
    lowest = min([y for _, y in points] + [left * bytes_per_s])
    axes.set_ylim(lowest / 2, max([y for _, y in points] + [operations_per_s]) * 4)
    axes.set_xlim(left, right)
    axes.set_xlabel("arithmetic intensity (operations for each byte)")
    axes.set_ylabel("operations per second")
    if title:
        figure.suptitle(title)
    grid(axes, "both")
    _shares_of_the_roof(shares_axes, series, bytes_per_s, operations_per_s)
    legend_below(figure, handles, columns=min(5, len(handles)))
    reached = []
    for name, group in series.items():
        shares = [y / min(x * bytes_per_s, operations_per_s) for x, y in group]
        reached.append(f"{name}: {min(shares):.0%} to {max(shares):.0%} of the roof")
    return Picture(
        figure,
        f"Roofline: memory gives {bytes_per_s / 1e12:.2f} TB/s, arithmetic {operations_per_s / 1e12:,.0f} T operations/s, "
        f"with the ridge at {ridge:.0f} operations for each byte. {'; '.join(reached)}.",
    )


def _shares_of_the_roof(
    axes: Axes, series: Mapping[str, Sequence[tuple[float, float]]], bytes_per_s: float, operations_per_s: float
) -> None:
    """A column for each series; each of its points has a place and a number of its own."""
    for index, group in enumerate(series.values()):
        look: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "color": DARK_COLOURS[index % len(DARK_COLOURS)]}
        for place, (x, y) in enumerate(group):
            share = 100 * y / min(x * bytes_per_s, operations_per_s)
            across = index + (place - (len(group) - 1) / 2) * 0.28
            axes.plot(across, share, linestyle="", markeredgecolor=INK, markersize=6, **look)
            axes.annotate(f"{share:.0f}", (across, share), (0, 6), textcoords="offset points", ha="center", fontsize=7.5)
    axes.axhline(100, color=INK, linewidth=1.4)
    axes.set_xticks(range(len(series)), list(series), rotation=25, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_xlim(-0.6, len(series) - 0.4)
    axes.set_ylim(0, 118)
    axes.set_ylabel("% of the roof above the point")
    grid(axes)


@styled
def context_parts(contexts: Mapping[str, Sequence[int]], tile: int) -> Picture:
    """A bar for each context, divided into the parts that programs read.

    ``contexts`` maps a label to the tokens of each part, in order; an empty part has 0. Marks are ``tile`` tokens apart.
    """
    figure = new_figure(1.0 + 0.42 * len(contexts))
    axes = figure.subplots()
    longest = max(sum(parts) for parts in contexts.values())
    told = []
    for row, (label, parts) in enumerate(contexts.items()):
        start = 0
        for number, count in enumerate(parts):
            if not count:
                continue
            colour = sequence_colour(number)
            axes.barh(row, count, left=start, height=0.6, color=colour, edgecolor=INK, linewidth=0.6)
            middle = start + count / 2
            if count > 0.03 * longest:
                axes.text(middle, row, str(number), ha="center", va="center", color=text_colour(colour), fontsize=9)
            else:  # it is thinner than its number, which stands above it
                axes.text(middle, row - 0.34, str(number), ha="center", va="bottom", color=INK, fontsize=8)
            start += count
        axes.plot(range(0, start, tile), [row + 0.36] * len(range(0, start, tile)), "|", color=INK, markersize=4)
        empty = sum(count == 0 for count in parts)
        note = f"{start} tokens" + (f", {empty} empty" if empty else "")
        axes.annotate(note, (start, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
        told.append(f"{label}: parts of {', '.join(map(str, parts))} tokens")
    axes.set_yticks(range(len(contexts)), list(contexts))
    axes.set_ylim(len(contexts) - 0.5, -0.6)
    axes.set_xlim(0, longest * 1.22)
    axes.set_xlabel(f"tokens of the context (a mark every {tile})")
    axes.set_title("Which part reads which tokens")
    axes.tick_params(axis="y", length=0)
    return Picture(figure, f"Contexts cut into parts, each read by a program of its own. {'; '.join(told)}.")
