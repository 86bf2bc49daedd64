"""The chart of a sweep: latency against throughput as the load grows. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pagebrain.viz.picture import Picture
from pagebrain.viz.style import BLUE, INK, LINES, MARKERS, VERMILLION, grid, legend_below, new_figure, styled

_LOOKS: dict[str, dict[str, Any]] = {
    "median": {"color": BLUE, "linestyle": LINES[0], "marker": MARKERS[0]},
    "p99": {"color": VERMILLION, "linestyle": LINES[1], "marker": MARKERS[1]},
}
_LOG_FROM = 20.0
"""Latencies whose ratio is larger than this are drawn on a logarithmic scale."""


@styled
def latency_chart(runs: Sequence[Mapping[str, Any]]) -> Picture:
    """Median and p99 of TTFT and TPOT against output tokens/s, a point for each run that has them, in order of load.

    Raises ``ValueError`` if no run has any.
    """
    measured = [run for run in runs if run["metrics"]["ttft_ms"] and run["metrics"]["tpot_ms"]]
    if not measured:
        raise ValueError("a latency chart needs a run in which requests were done")
    figure = new_figure(3.6)
    panels = figure.subplots(1, 2)
    for axes, name, title in zip(panels, ("ttft_ms", "tpot_ms"), ("Time to first token", "Time per output token")):
        _panel(axes, measured, name)
        axes.set_title(title)
        axes.set_xlabel("output tokens/s")
    panels[0].set_ylabel("ms")
    legend_below(figure, [Line2D([], [], **look, label=label) for label, look in _LOOKS.items()])
    return Picture(figure, _alt(measured))


def _panel(axes: Axes, runs: Sequence[Mapping[str, Any]], name: str) -> None:
    speeds = [run["metrics"]["output_tokens_per_s"] for run in runs]
    for column, look in _LOOKS.items():
        axes.plot(speeds, [run["metrics"][name][column] for run in runs], **look, markeredgecolor=INK, markeredgewidth=0.6)
    for run, speed in zip(runs, speeds):
        place = (speed, run["metrics"][name]["p99"])
        axes.annotate(run["load_label"], place, (0, 5), textcoords="offset points", ha="center", fontsize=8)
    values = [run["metrics"][name][column] for run in runs for column in _LOOKS]
    if min(values) > 0 and max(values) > _LOG_FROM * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(0, 1.15 * max(values))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlim(0, 1.08 * max(speeds))
    grid(axes, "both")


def _alt(runs: Sequence[Mapping[str, Any]]) -> str:
    points = []
    for run in runs:
        numbers = run["metrics"]
        ttft, tpot = numbers["ttft_ms"], numbers["tpot_ms"]
        points.append(
            f"{run['load']}: {numbers['output_tokens_per_s']:,.0f} tokens/s, TTFT median {ttft['median']:.3g} and p99 "
            f"{ttft['p99']:.3g} ms, TPOT median {tpot['median']:.3g} and p99 {tpot['p99']:.3g} ms"
        )
    return f"Latency against throughput. {'; '.join(points)}."
