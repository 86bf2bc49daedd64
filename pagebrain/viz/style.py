"""How all pictures look: colours that colour-blind readers and grey printers can tell apart, type sizes, a white ground.

The colours are those of Okabe and Ito, two of them shifted, in an order that alternates dark and light: neighbours differ in
luminance, and letters, numbers and hatches say again what the colours say.
"""

from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

SEQUENCE_COLOURS = ("#0072B2", "#E69F00", "#00795A", "#F0E442", "#B34700", "#56B4E9", "#7B3F6E", "#F2C4DE")
"""Dark, light, dark, light, and so on; a sequence takes the one at its id modulo their number."""

BLUE, ORANGE, GREEN, YELLOW, VERMILLION, SKY, PURPLE, PINK = SEQUENCE_COLOURS
INK, GREY, PALE, PAPER = "#222222", "#767676", "#E4E4E4", "#FFFFFF"

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)), (0, (3, 3)))

WIDTH = 7.0
"""Inches. At 100 points an inch on the page, a picture is 700 pixels wide."""

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
"""Decorator of everything that draws, so that a reader's own settings neither change these pictures nor are changed."""


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure that pyplot knows nothing of: a notebook shows it when asked, and only then."""
    return Figure(figsize=(width, height), layout="constrained")


def luminance(colour: str) -> float:
    """How bright a colour is on a grey printer, 0 to 1 (Rec. 601 weights)."""
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def sequence_colour(seq_id: int) -> str:
    """A sequence's colour, the same in every picture."""
    return SEQUENCE_COLOURS[seq_id % len(SEQUENCE_COLOURS)]


def text_colour(ground: str) -> str:
    """Black or white, whichever reads better on ``ground``."""
    return PAPER if luminance(ground) < 0.5 else "#000000"


def tint(colour: str, share: float = 0.25) -> str:
    """The colour mixed with white; ``share`` is how much of it stays."""
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
