"""The roofline: how fast a kernel of a given arithmetic intensity can be at most, drawn in characters.

Below the ridge memory is the roof (operations per byte times bytes per second), beyond it arithmetic is (Williams, Waterman
and Patterson, "Roofline: an insightful visual performance model", 2009).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 64, 16


@dataclass(frozen=True)
class Point:
    """One measured kernel: its mark in the picture, operations per byte, operations per second."""

    mark: str
    intensity: float
    flops_per_s: float


def roof(intensity: float, bytes_per_s: float, flops_per_s: float) -> float:
    """Operations per second that a kernel of this intensity can reach at most."""
    return min(intensity * bytes_per_s, flops_per_s)


def draw(points: Sequence[Point], bytes_per_s: float, flops_per_s: float) -> str:
    """The roof and the points on logarithmic axes, as lines of text. A later point covers an earlier one in its place."""
    ridge = flops_per_s / bytes_per_s
    left = math.log10(min([point.intensity for point in points] + [1.0])) - 0.2
    right = math.log10(max([point.intensity for point in points] + [ridge])) + 0.4
    highest = max([point.flops_per_s for point in points] + [flops_per_s])  # a point may beat a roof that was measured
    top = math.log10(highest) + 0.1
    lowest = min([point.flops_per_s for point in points] + [roof(10**left, bytes_per_s, flops_per_s)])
    bottom = math.log10(lowest) - 0.1

    def column(intensity: float) -> int:
        return round((math.log10(intensity) - left) / (right - left) * (_WIDTH - 1))

    def line(rate: float) -> int:
        return round((top - math.log10(rate)) / (top - bottom) * (_HEIGHT - 1))

    canvas = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for x in range(_WIDTH):
        rate = roof(10 ** (left + x / (_WIDTH - 1) * (right - left)), bytes_per_s, flops_per_s)
        canvas[line(rate)][x] = "-" if rate == flops_per_s else "/"
    for point in points:
        canvas[line(point.flops_per_s)][column(point.intensity)] = point.mark
    rows = [
        f"{_label(10 ** (top - y / (_HEIGHT - 1) * (top - bottom)), y):>9} |{''.join(canvas[y])}" for y in range(_HEIGHT)
    ]
    axis = f"{'':>9} +{'-' * _WIDTH}"
    ends = f"{10**left:.2g}", f"{10**right:.0f} FLOP/byte"
    return "\n".join([*rows, axis, f"{'':>11}{ends[0]}{ends[1]:>{_WIDTH - len(ends[0])}}"])


def _label(rate: float, y: int) -> str:
    """Every fifth line says what it stands for, in TFLOP/s."""
    return f"{rate / 1e12:.3g} T" if y % 5 == 0 else ""
