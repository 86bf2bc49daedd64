"""A figure with its alt text.

In a notebook a picture is saved as PNG, which every viewer shows, GitHub's included. Its alt text is stored in the output's
metadata, where nbconvert and other tools read it, and in the plain-text form of the output.
"""

import base64
import io
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pagebrain.viz.style import styled

DOTS_PER_INCH = 144
PIXELS_PER_INCH = 100
"""Of the page. There are more dots than pixels, so that pictures are sharp on high-resolution screens."""

NUM_COLOURS = 128
"""In the palette of a PNG."""


class Picture:
    """A matplotlib figure with its alt text. As the last expression of a notebook cell it is shown once.

    Attributes:
        figure: not registered with pyplot.
        alt: the content of the picture in a sentence or two.
    """

    def __init__(self, figure: Figure, alt: str) -> None:
        if not alt.strip():
            raise ValueError("a picture needs an alt text: say in a sentence what it shows")
        self.figure = figure
        self.alt = " ".join(alt.split())

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    def with_alt(self, alt: str) -> "Picture":
        """The same figure with another alt text."""
        return Picture(self.figure, alt)

    @styled
    def png(self) -> bytes:
        """The picture as PNG; the same figure gives the same bytes."""
        self._settle()
        drawn, packed = io.BytesIO(), io.BytesIO()
        self.figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
        about = PngInfo()
        about.add_itxt("Description", self.alt)
        # The picture has few colours, so a palette is enough. The file is then a third as large.
        image = Image.open(drawn).convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE)
        image.save(packed, format="png", optimize=True, pnginfo=about)
        return packed.getvalue()

    @styled
    def svg(self) -> str:
        """The picture as SVG, with the alt text as its description; the same figure gives the same text."""
        self._settle()
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": self.alt})
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.png`` or ``.svg`` file."""
        path = Path(path)
        if path.suffix == ".png":
            path.write_bytes(self.png())
        elif path.suffix == ".svg":
            path.write_text(self.svg(), encoding="utf-8", newline="\n")
        else:
            raise ValueError(f"a picture is saved as .png or .svg, got {path.name!r}")

    def _settle(self) -> None:
        """Fix the layout of the figure. Repeated layouts differ in the last bits, and so would the bytes of the files."""
        if self.figure.get_layout_engine() is not None:
            FigureCanvasAgg(self.figure)
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")
            for axes in self.figure.axes:
                axes.set_position([round(bound, 6) for bound in axes.get_position().bounds])  # type: ignore[arg-type]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        """The data that Jupyter saves and shows."""
        data = {"image/png": base64.b64encode(self.png()).decode("ascii"), "text/plain": repr(self)}
        width = round(float(self.figure.get_size_inches()[0]) * PIXELS_PER_INCH)
        return data, {"image/png": {"alt": self.alt, "width": width}}


def show(picture: Picture | Figure, alt: str | None = None) -> None:
    """Show a picture, or any matplotlib figure with an alt text, from within a notebook cell.

    Close a figure made with pyplot (``plt.close(figure)``), or it is shown a second time at the cell's end.
    """
    from IPython.display import display

    if isinstance(picture, Figure):
        picture = Picture(picture, alt or "")
    elif alt is not None:
        picture = picture.with_alt(alt)
    display(picture)  # type: ignore[no-untyped-call]


def alt_to_cells(notebook: MutableMapping[str, Any]) -> int:
    """Copy the alt texts of a notebook's pictures to the cells' metadata for myst-nb. Returns the number of pictures.

    myst-nb has one alt text for all pictures of a cell, so the texts of a cell are joined.
    """
    count = 0
    for cell in notebook["cells"]:
        metadata = [output.get("metadata", {}).get("image/png", {}) for output in cell.get("outputs", ())]
        alts = [entry["alt"] for entry in metadata if "alt" in entry]
        count += len(alts)
        if alts:
            cell["metadata"].setdefault("mystnb", {}).setdefault("image", {})["alt"] = " ".join(alts)
    return count
