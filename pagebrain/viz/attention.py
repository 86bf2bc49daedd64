"""Attention that accumulates page by page: the contribution of each page, and the convergence of the output."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from pagebrain.viz.picture import Picture
from pagebrain.viz.style import INK, PALE, grid, new_figure, sequence_colour, styled

Numbers = Sequence[float] | Any
"""A list of numbers, or anything with ``tolist()``: a tensor, an array."""


class PageStep(NamedTuple):
    """The state of one query and one head after a page.

    Attributes:
        scores: ``[block_size]``, of this page; minus infinity for slots that the query does not attend to.
        maximum: the largest score so far.
        total: the sum of ``exp(score - maximum)`` so far.
        acc: ``[head_dim]``, the sum of the values weighted by ``exp(score - maximum)`` so far. ``acc / total`` is the output
            over the pages so far.
    """

    scores: Numbers
    maximum: float | Any
    total: float | Any
    acc: Numbers


@styled
def attention_by_page(pages: Sequence[PageStep | tuple[Any, ...]], block_ids: Sequence[int] | None = None) -> Picture:
    """Three views of one query of one head: scores and their running maximum, final weights, distance to the final output.

    Args:
        pages: in logical order, as :class:`PageStep` or tuples ``(scores, maximum, total, acc)`` of lists or tensors.
        block_ids: the physical blocks that hold the pages.
    """
    steps = [_plain(page) for page in pages]
    if not steps:
        raise ValueError("attention_by_page needs at least one page")
    errors, weights = convergence(steps), slot_weights(steps)
    figure = new_figure(5.2)
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(1.3, 1, 1))
    position = 0
    lowest = min(score for page in steps for score in page.scores if math.isfinite(score))
    floor = lowest - 0.1 * max(1e-9, max(page.maximum for page in steps) - lowest)
    centres = []
    for number, (page, share) in enumerate(zip(steps, weights)):
        slots = range(position, position + len(page.scores))
        seen = [score if math.isfinite(score) else floor for score in page.scores]
        look: dict[str, Any] = {"color": sequence_colour(number), "edgecolor": INK, "linewidth": 0.6, "width": 0.8}
        above.bar(slots, [score - floor for score in seen], bottom=floor, **look)
        middle.bar(slots, share, **look)
        above.plot([position - 0.5, position + len(slots) - 0.5], [page.maximum] * 2, color=INK, linewidth=2.2)
        centres.append(position + (len(slots) - 1) / 2)
        _note(above, centres[-1], page.maximum, f"{page.maximum:.2f}")
        position += len(slots)
        for axes in (above, middle, below):
            axes.axvline(position - 0.5, color=PALE, linewidth=1, zorder=0)
    below.plot(centres, errors, color=INK, zorder=3)
    for number, (centre, error) in enumerate(zip(centres, errors)):
        below.plot([centre], [error], "o", color=sequence_colour(number), markeredgecolor=INK, markersize=9, zorder=4)
        _note(below, centre, error, f"{error:.2g}", distance=8)
    highest = max(page.maximum for page in steps)
    above.set_ylim(floor, highest + 0.2 * (highest - floor))
    above.set_title("Scores, and the largest so far (line)")
    middle.set_title("Softmax weight of each token in the end")
    below.set_title("Distance of the output so far to the final output, relative")
    below.set_ylim(0, max(*errors, 1e-12) * 1.35)
    below.set_xlim(-0.7, position - 0.3)
    blocks = [f"\nblock {block_ids[number]}" if block_ids else "" for number in range(len(steps))]
    below.set_xticks(centres, [f"page {number}{block}" for number, block in enumerate(blocks)])
    below.tick_params(axis="x", length=0)
    for axes in (above, middle, below):
        grid(axes)
    return Picture(figure, _alt(steps, errors, block_ids))


def _note(axes: Axes, x: float, y: float, text: str, distance: float = 4) -> None:
    """A number ``distance`` points above its place."""
    axes.annotate(text, (x, y), (0, distance), textcoords="offset points", ha="center", fontsize=9)


def slot_weights(steps: Sequence[PageStep]) -> list[list[float]]:
    """The softmax weight of every slot after all pages; masked slots have 0."""
    last = steps[-1]
    return [[math.exp(score - last.maximum) / last.total for score in page.scores] for page in steps]


def convergence(steps: Sequence[PageStep]) -> list[float]:
    """After each page, the distance of ``acc / total`` to the final one, relative to the norm of the final one."""
    outputs = [[value / page.total for value in page.acc] for page in steps]
    length = math.hypot(*outputs[-1]) or 1.0
    return [math.dist(output, outputs[-1]) / length for output in outputs]


def _plain(page: PageStep | tuple[Any, ...]) -> PageStep:
    """A page with tensors as lists and floats. Raises ``ValueError`` for a wrong shape."""
    numbers: list[Any] = [value.tolist() if hasattr(value, "tolist") else value for value in page]
    scores, maximum, total, acc = numbers
    _expect(isinstance(scores, Sequence) and all(map(_is_number, scores)), "scores must be a list of numbers", scores)
    _expect(_is_number(maximum), "maximum must be a number", maximum)
    _expect(_is_number(total), "total must be a number", total)
    _expect(isinstance(acc, Sequence) and all(map(_is_number, acc)), "acc must be a list of numbers", acc)
    return PageStep(list(scores), float(maximum), float(total), list(acc))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _expect(is_right: bool, claim: str, got: Any) -> None:
    if not is_right:
        raise ValueError(f"attention_by_page draws one head of one query: {claim}, got {got!r:.80}")


def _alt(steps: Sequence[PageStep], errors: Sequence[float], block_ids: Sequence[int] | None) -> str:
    lie = f", in physical blocks {', '.join(map(str, block_ids))}" if block_ids else ""
    maxima = ", ".join(f"{page.maximum:.2f}" for page in steps)
    distances = ", ".join(f"{error:.2g}" for error in errors)
    return (
        f"Attention of one query over {len(steps)} pages{lie}. Largest score so far after each page: {maxima}. "
        f"Relative distance to the final output: {distances}."
    )
