"""Pictures of kernels draw what they are given, and say it."""

from typing import Any, cast

import pytest

pytest.importorskip("matplotlib")

from matplotlib.patches import Rectangle  # noqa: E402

from pagebrain import viz  # noqa: E402


def test_the_roof_breaks_at_the_ridge_and_every_point_is_drawn() -> None:
    picture = viz.roofline({"decode": [(1.0, 2e12), (1.0, 4e12)], "prefill": [(170.0, 3e14)]}, 4e12, 8e14)
    axes, shares = picture.figure.axes
    roof, _, decode, prefill = [[*map(list, line.get_xydata())] for line in cast(Any, axes.get_lines())]
    assert [rate for _, rate in roof[1:]] == [8e14, 8e14] and roof[1][0] == 200
    assert decode == [[1.0, 2e12], [1.0, 4e12]] and prefill == [[170.0, 3e14]]
    assert "decode: 50% to 100% of the roof" in picture.alt and "ridge at 200" in picture.alt
    marks = [line.get_xydata()[0].tolist() for line in cast(Any, shares.get_lines())[:3]]
    assert [share for _, share in marks] == [50.0, 100.0, 44.11764705882353]
    assert [label.get_text() for label in shares.get_xticklabels()] == ["decode", "prefill"]
    assert len({across for across, _ in marks}) == 3, "points of one intensity have places of their own in the second panel"


def test_a_roof_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        viz.roofline({"decode": []}, 1e12, 1e14)


def test_parts_are_drawn_one_after_the_other_and_empty_ones_are_told() -> None:
    picture = viz.context_parts({"A": [32, 18, 0], "B": [16, 1]}, tile=16)
    [axes] = picture.figure.axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0, 32), (32, 18), (0, 16), (16, 1)]
    numbers = [(text.get_text(), text.get_position()[0]) for text in axes.texts if len(text.get_text()) == 1]
    assert numbers == [("0", 16.0), ("1", 41.0), ("0", 8.0), ("1", 16.5)], "every part has its number, also a thin one"
    assert "A: parts of 32, 18, 0 tokens" in picture.alt
    assert "50 tokens, 1 empty" in [text.get_text() for text in axes.texts]
