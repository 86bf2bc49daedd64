"""Charts of measurements: latency, load, fragmentation, and the ladder of stages."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from pagebrain.viz.picture import Picture
from pagebrain.viz.style import (
    BLUE,
    DARK_COLOURS,
    GREY,
    INK,
    LINES,
    MARKERS,
    ORANGE,
    PAPER,
    SKY,
    VERMILLION,
    grid,
    legend_below,
    new_figure,
    styled,
    text_colour,
)

_LOG_FROM = 20.0
"""Values whose ratio is larger than this are drawn on a logarithmic scale."""


@styled
def latency_by_context(series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Picture:
    """Time per token against context length. ``series`` maps a stage to ``(context_lens, seconds)``, which give a line."""
    lines = {label: (list(lengths), [1000 * value for value in seconds]) for label, (lengths, seconds) in series.items()}
    figure, axes = _lines(lines)
    axes.set_title("Time for one more token")
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("ms per token")
    ends = [
        f"{label} goes from {times[0]:.3g} ms at {lengths[0]:g} tokens of context to {times[-1]:.3g} ms at {lengths[-1]:g}"
        for label, (lengths, times) in lines.items()
    ]
    return Picture(figure, f"Time per token against context length: {'; '.join(ends)}.")


@styled
def latency_throughput(series: Mapping[str, Sequence[tuple[float, float]]], latency: str = "latency (s)") -> Picture:
    """Latency against throughput under growing load, a curve for each system.

    ``series`` maps a label to points ``(throughput in tokens/s, latency in seconds)`` in order of load. ``latency`` is the
    label of the axis.
    """
    lines = {label: ([x for x, _ in points], [y for _, y in points]) for label, points in series.items()}
    figure, axes = _lines(lines)
    axes.set_title("What more load costs: further right and lower is better")
    axes.set_xlabel("throughput (tokens/s)")
    axes.set_ylabel(latency)
    best = [
        f"{label} reaches {max(xs):,.0f} tokens/s, with values from {min(ys):.3g} to {max(ys):.3g}"
        for label, (xs, ys) in lines.items()
    ]
    return Picture(figure, f"Throughput against {latency}: {'; '.join(best)}.")


def _lines(lines: Mapping[str, tuple[list[float], list[float]]]) -> tuple[Figure, Axes]:
    """Lines that differ in colour, stroke and marker."""
    figure = new_figure(3.6)
    axes = figure.subplots()
    handles = []
    for index, (label, (xs, ys)) in enumerate(lines.items()):
        look: dict[str, Any] = {
            "color": DARK_COLOURS[index % len(DARK_COLOURS)],
            "linestyle": LINES[index % len(LINES)],
            "marker": MARKERS[index % len(MARKERS)],
            "markeredgecolor": INK,
            "markeredgewidth": 0.6,
        }
        axes.plot(xs, ys, **look)
        handles.append(Line2D([], [], **look, label=label))
    values = [value for _, ys in lines.values() for value in ys]
    if len(lines) > 1 and min(values) > 0 and max(values) > _LOG_FROM * min(values):  # a small line would not be visible
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, None)
    axes.set_xlim(0, None)
    grid(axes, "both")
    legend_below(figure, handles, columns=min(4, max(1, len(handles))))
    return figure, axes


_SHARES = {
    "token states": (BLUE, ""),
    "reserved": (SKY, "..."),
    "internal": (ORANGE, "////"),
    "external": (VERMILLION, "xxx"),
}
_PAPER: dict[str, Any] = {"marker": "D", "linestyle": "", "color": PAPER, "markeredgecolor": "#000000", "markersize": 8}
_SHARE_NAMES = {
    "token states": "token states",
    "reserved": "reserved for later tokens",
    "internal": "internal fragmentation",
    "external": "external fragmentation",
}


@styled
def fragmentation_bars(systems: Mapping[str, Mapping[str, float]], paper: Mapping[str, float] | None = None) -> Picture:
    """The contents of the cache's memory in percent, a bar for each system.

    Args:
        systems: label -> ``{"token states": x, "reserved": y, "internal": z, "external": w}``, all in one unit. A missing
            key means 0.
        paper: label -> published percentage of token states, drawn as a diamond.
    """
    unknown = {key for parts in systems.values() for key in parts} - set(_SHARES)
    if unknown:
        raise ValueError(f"fragmentation_bars knows {', '.join(_SHARES)}; got {', '.join(sorted(unknown))}")
    shares = {label: _percent(parts) for label, parts in systems.items()}
    paper = paper or {}
    figure = new_figure(1.25 + 0.5 * len(systems))
    axes = figure.subplots()
    for row, (label, parts) in enumerate(shares.items()):
        left = 0.0
        for key, (colour, hatch) in _SHARES.items():
            axes.barh(row, parts[key], left=left, height=0.66, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0.8)
            if parts[key] >= 5:
                box = {"facecolor": colour, "edgecolor": "none", "pad": 1}
                centre = left + parts[key] / 2
                text = f"{parts[key]:.1f}"
                axes.text(centre, row, text, ha="center", va="center", color=text_colour(colour), fontsize=9, bbox=box)
            left += parts[key]
        if label in paper:
            axes.plot([paper[label]], [row - 0.33], **_PAPER, zorder=5, clip_on=False)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set_ylim(len(shares) - 0.5, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent of the cache's memory")
    axes.tick_params(axis="y", length=0)
    handles: list[Any] = [
        Patch(facecolor=colour, hatch=hatch, edgecolor=PAPER, label=_SHARE_NAMES[key])
        for key, (colour, hatch) in _SHARES.items()
        if any(parts[key] for parts in shares.values())
    ]
    if paper:
        handles.append(Line2D([], [], **_PAPER, label="paper"))
    legend_below(figure, handles, columns=3)
    return Picture(figure, _fragmentation_alt(shares, paper))


def _percent(parts: Mapping[str, float]) -> dict[str, float]:
    """Percentages of the sum, in the order of drawing."""
    total = sum(parts.values())
    return {key: 100 * parts.get(key, 0.0) / total if total else 0.0 for key in _SHARES}


def _fragmentation_alt(shares: Mapping[str, Mapping[str, float]], paper: Mapping[str, float]) -> str:
    bars = []
    for label, parts in shares.items():
        words = ", ".join(f"{_SHARE_NAMES[key]} {value:.1f} %" for key, value in parts.items() if value)
        bars.append(f"{label}: {words}" + (f" (paper: token states {paper[label]:g} %)" if label in paper else ""))
    return f"Shares of the cache's memory. {'; '.join(bars)}."


@styled
def staircase(rows: Sequence[Mapping[str, Any]], note: str = "") -> Picture:
    """The ladder of stages, in three panels: throughput, time per token, and memory of the KV cache.

    Each row has ``stage`` (its label), ``tokens_per_s``, ``ms_per_token`` and ``kv_bytes``. A bar is left out for ``None``
    or a missing key. ``note`` is a line below: the work, the machine, the date.
    """
    figure = new_figure(1.0 + 0.36 * max(2, len(rows)) + 0.3 * bool(note))
    panels = figure.subplots(1, 3, sharey=True)
    columns = (("tokens_per_s", "tokens/s", 1.0), ("ms_per_token", "ms per token", 1.0), ("kv_bytes", "KV cache (MB)", 1e6))
    for axes, (key, title, unit), colour in zip(panels, columns, (BLUE, ORANGE, SKY)):
        values = [None if row.get(key) is None else float(row[key]) / unit for row in rows]
        _bars(axes, values, title, colour)
    panels[0].set_yticks(range(len(rows)), [str(row["stage"]) for row in rows])
    panels[0].set_ylim(len(rows) - 0.45, -0.55)
    if note:
        figure.supxlabel(note, fontsize=8.5, color=GREY, x=0.01, ha="left")
    return Picture(figure, " ".join(["The ladder.", *(_rung(row) for row in rows), note]))


def _bars(axes: Axes, values: Sequence[float | None], title: str, colour: str) -> None:
    """One panel, with a number at the end of each bar."""
    known = [value for value in values if value]
    is_log = bool(known) and max(known) > _LOG_FROM * min(known)
    floor = min(known) / 3 if is_log else 0.0
    if is_log:
        axes.set_xscale("log")
    for row, value in enumerate(values):
        if value:
            axes.barh(row, value - floor, left=floor, height=0.62, color=colour, edgecolor=INK, linewidth=0.6)
        text = "none" if value is None else _short(value)
        axes.annotate(text, (max(value or 0, floor), row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    top = max(known, default=1.0)
    axes.set_xlim(floor, floor * (top / floor) ** 1.45 if is_log else top * 1.4)
    axes.set_title(title + (" (log)" if is_log else ""))
    axes.set_xticks([])
    axes.minorticks_off()
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)


def _short(value: float) -> str:
    """Three digits, with commas for thousands."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rung(row: Mapping[str, Any]) -> str:
    """The alt text of one stage."""
    units = (("tokens_per_s", "tokens/s"), ("ms_per_token", "ms per token"))
    parts = [f"{_short(float(row[key]))} {unit}" for key, unit in units if row.get(key) is not None]
    kv_bytes = row.get("kv_bytes")
    parts.append("no KV cache" if kv_bytes is None else f"{_short(float(kv_bytes) / 1e6)} MB of KV cache")
    return f"{row['stage']}: {', '.join(parts)}."
