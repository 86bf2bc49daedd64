"""A picture of what watched kernels read and write: a line for each load and store, a box for each number of its tensor."""

from collections.abc import Mapping

from matplotlib.patches import Rectangle
from torch import Tensor

from chapters.aids.watch_kernels import Watch
from pagebrain.viz.picture import Picture
from pagebrain.viz.style import GREY, INK, new_figure, sequence_colour, styled


@styled
def draw_accesses(watch: Watch, tensors: Mapping[str, Tensor]) -> Picture:
    """Loads and stores in order, each on a line, in the colour of its program. ``tensors``, by argument name, are drawn.

    A filled box is a number that is read or written. A cross is a place of the tile that the mask leaves out. Such a place
    may lie past the tensor's end.
    """
    rows = [access for access in watch.accesses if access.tensor in tensors]
    programs = sorted({access.program for access in rows})
    width = max([tensor.numel() for tensor in tensors.values()] + [1])
    figure = new_figure(0.9 + 0.27 * len(rows))
    axes = figure.subplots()
    labels, told = [], []
    for line, access in enumerate(rows):
        for place in range(tensors[access.tensor].numel()):
            axes.add_patch(Rectangle((place, line - 0.35), 1, 0.7, facecolor="none", edgecolor=GREY, linewidth=0.5))
        colour = sequence_colour(programs.index(access.program))
        for place, is_used in zip(access.places.flat, access.is_used.flat):
            if is_used:
                axes.add_patch(Rectangle((place, line - 0.35), 1, 0.7, facecolor=colour, edgecolor=INK, linewidth=0.6))
            elif 0 <= place < width + 4:
                axes.plot(place + 0.5, line, "x", color=colour, markersize=4)
        used = sorted({int(place) for place in access.places[access.is_used]})
        labels.append(
            f"program {', '.join(map(str, access.program[:1]))} {access.verb} {access.tensor.removesuffix('_ptr')}"
        )
        told.append(f"{labels[-1]} {_ranges(used)}")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.3, width + 4.3)
    axes.set_xlabel("number of the tensor, counted from its first (crosses: left out by the mask)")
    axes.tick_params(axis="y", length=0)
    return Picture(figure, f"Loads and stores in order. {'; '.join(told)}.")


def _ranges(places: list[int]) -> str:
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "nothing"
