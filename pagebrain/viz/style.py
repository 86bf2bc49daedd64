"""The style of all pictures: colours, type sizes, a white background.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish, with two of them changed. Their order
alternates dark and light, so that neighbours differ on a grey printer. Letters, numbers and hatches repeat the information
of the colours.
"""

from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

SEQUENCE_COLOURS = ("#0072B2", "#E69F00", "#00795A", "#F0E442", "#B34700", "#56B4E9", "#7B3F6E", "#F2C4DE")
"""Alternately dark and light. The colour of a sequence is the one at its id modulo their number."""

BLUE, ORANGE, GREEN, YELLOW, VERMILLION, SKY, PURPLE, PINK = SEQUENCE_COLOURS
INK, GREY, PALE, PAPER = "#222222", "#767676", "#E4E4E4", "#FFFFFF"

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)), (0, (3, 3)))

WIDTH = 7.0
"""Inches. At 100 pixels per inch on the page, a picture is 700 pixels wide."""

FONT = 9.5

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": FONT,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": FONT,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "hatch.linewidth": 0.8,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.hashsalt": "pagebrain",
    "svg.fonttype": "path",
}

styled = mpl.rc_context(cast(Any, STYLE))
"""Decorator of all drawing functions. The user's own matplotlib settings do not affect the pictures and are not changed."""


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure that is not registered with pyplot, so that a notebook does not show it by itself."""
    return Figure(figsize=(width, height), layout="constrained")


def luminance(colour: str) -> float:
    """The brightness of a colour in grey, 0 to 1 (Rec. 601 weights)."""
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


DARK_COLOURS = tuple(colour for colour in SEQUENCE_COLOURS if luminance(colour) < 0.8)
"""The colours in which thin lines and small marks are visible on white."""


def sequence_colour(seq_id: int) -> str:
    """The colour of a sequence, the same in every picture."""
    return SEQUENCE_COLOURS[seq_id % len(SEQUENCE_COLOURS)]


def text_colour(ground: str) -> str:
    """The more legible of black and white on ``ground``."""
    return PAPER if luminance(ground) < 0.5 else "#000000"


def tint(colour: str, share: float = 0.25) -> str:
    """The colour mixed with white; ``share`` is the share of the colour."""
    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))


def legend_below(figure: Figure, handles: list[Any], columns: int | None = None) -> None:
    """One legend for the whole figure, under it."""
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns or len(handles),
        handlelength=1.8,
        columnspacing=1.4,
        handletextpad=0.5,
    )


def grid(axes: Axes, axis: Any = "y") -> None:
    """Faint lines behind the data."""
    axes.grid(True, axis=axis)
