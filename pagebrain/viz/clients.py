"""Timelines of an engine thread, an event loop and their clients, each in a lane."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from pagebrain.viz.picture import Picture
from pagebrain.viz.style import GREY, INK, PALE, PAPER, legend_below, new_figure, sequence_colour, styled


@dataclass(frozen=True)
class Visit:
    """Times of one client, in seconds of any clock: when it came, when it had each token, when it went."""

    came: float
    tokens: Sequence[float]
    gone: float


@styled
def lanes(
    steps: Sequence[tuple[float, float, str]],
    readings: Sequence[tuple[float, Sequence[tuple[str, str]]]],
    visits: Mapping[str, Visit],
) -> Picture:
    """Lanes over time.

    Args:
        steps: beginning and end of each step of the engine, and the names of the clients in it.
        readings: times at which the event loop read its notes, and the notes: ``("+", name)`` for a client that came,
            ``("-", name)`` for one that departed.
        visits: the clients by name, on the same clock.
    """
    origin = min(visit.came for visit in visits.values())
    places = {name: 2 + index for index, name in enumerate(visits)}

    def ms(moment: float) -> float:
        return (moment - origin) * 1e3

    figure = new_figure(2.2 + 0.5 * len(visits))
    axes = figure.subplots()
    for began, ended, who in steps:
        axes.add_patch(Rectangle((ms(began), -0.36), ms(ended) - ms(began), 0.72, facecolor=PALE, edgecolor=GREY))
        axes.text((ms(began) + ms(ended)) / 2, 0, who, ha="center", va="center", fontsize=9)
    span = max([ms(moment) for moment, _ in readings] + [ms(ended) for _, ended, _ in steps])
    labels: list[Any] = []
    for moment, notes in readings:
        axes.plot([ms(moment)] * 2, [0.75, 1.25], color=INK, linewidth=1.3)
        for sign, name in notes:
            written = visits[name].came if sign == "+" else visits[name].gone
            axes.plot([ms(written), ms(moment)], [places[name], 1.28], color=GREY, linestyle=":", linewidth=1.2, zorder=1)
        if notes:
            marks = "".join(f" {'+' if sign == '+' else chr(0x2212)}{name}" for sign, name in notes)
            if labels and ms(moment) - labels[-1].get_position()[0] < 0.04 * len(labels[-1].get_text()) / 3 * span:
                labels[-1].set(text=labels[-1].get_text() + marks, x=ms(moment))  # two labels would overlap: one for both
            else:
                labels.append(axes.text(ms(moment), 1.02, marks, ha="left", va="center", fontsize=9, weight="bold"))
    for index, (name, visit) in enumerate(visits.items()):
        place = places[name]
        edge: dict[str, Any] = {"linestyle": "", "markeredgecolor": INK, "markeredgewidth": 0.7}
        axes.plot([ms(visit.came), ms(visit.gone)], [place] * 2, color=PALE, linewidth=7, zorder=0)
        axes.plot(ms(visit.came), place, marker=">", color=PAPER, markersize=8, **edge)
        axes.plot(list(map(ms, visit.tokens)), [place] * len(visit.tokens), marker="o", color=sequence_colour(index), **edge)
        axes.plot(ms(visit.gone), place, marker="x", color="#000000", markersize=8, markeredgewidth=1.6)
    names = ["engine thread", "event loop", *(f"client {name}" for name in visits)]
    axes.set_yticks(range(len(names)), names, fontweight="bold")
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(-0.04 * span, 1.09 * span)  # a label stands to the right of the last reading
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("milliseconds")
    dot: dict[str, Any] = {"markeredgecolor": INK, "linestyle": ""}
    handles = [
        Patch(facecolor=PALE, edgecolor=GREY, label="a step, with its clients"),
        Line2D([], [], color=INK, label="notes are read"),
        Line2D([], [], marker=">", color=PAPER, label="comes: writes a note", **dot),
        Line2D([], [], marker="o", color=GREY, label="has a token", **dot),
        Line2D([], [], marker="x", color="#000000", linestyle="", label="departs: writes a note"),
        Line2D([], [], color=GREY, linestyle=":", label="from a note to its reading"),
    ]
    legend_below(figure, handles, columns=3)
    return Picture(figure, _alt(steps, readings, visits))


def _alt(
    steps: Sequence[tuple[float, float, str]],
    readings: Sequence[tuple[float, Sequence[tuple[str, str]]]],
    visits: Mapping[str, Visit],
) -> str:
    order = ", ".join(who for _, _, who in steps)
    said = [
        f"{name} has {len(visit.tokens)} tokens and is in {sum(name in who for *_, who in steps)} steps"
        for name, visit in visits.items()
    ]
    return (
        f"Lanes over time. The engine thread computes {len(steps)} steps, with {order} in them. "
        f"The event loop reads its notes {len(readings)} times, between steps. {'; '.join(said)}."
    )
