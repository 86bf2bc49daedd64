"""Build the notebooks from their text sources, and say whether they are in step.

    python -m tools.notebooks build [NN ...]    make notebooks/*.ipynb anew from notebooks/src/*.py and execute them
    python -m tools.notebooks check             say what a source and its notebook do not agree on

A notebook is committed executed. What its cells are is the source's to say; only outputs come from running it. Nothing that
changes from run to run is kept beside them: no times, no execution counts out of order, no version of the kernel.
"""

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from pagebrain import viz

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
SOURCES = NOTEBOOKS / "src"
CELL_TIMEOUT_S = 300
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def source_paths() -> list[Path]:
    """The text sources, in reading order."""
    return sorted(SOURCES.glob("[0-9][0-9]_*.py"))


def notebook_path(source: Path) -> Path:
    """Where a source's notebook lies."""
    return NOTEBOOKS / f"{source.stem}.ipynb"


def read_source(source: Path) -> NotebookNode:
    """The notebook that a source describes, without outputs. Cell ids depend on the text alone."""
    notebook: NotebookNode = jupytext.read(source)
    notebook.metadata = nbformat.from_dict(METADATA)
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return notebook


def execute(notebook: NotebookNode) -> None:
    """Run all cells in order, in ``notebooks/``, and keep nothing of the run but outputs."""
    # Two threads that wait for each other are slower than one, for models this small.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", record_timing=False)
    client.execute(cwd=str(NOTEBOOKS))
    notebook.metadata = nbformat.from_dict(METADATA)
    viz.alt_to_cells(notebook)


def build(source: Path) -> None:
    """Make one notebook anew."""
    began = time.monotonic()
    notebook = read_source(source)
    execute(notebook)
    nbformat.write(notebook, notebook_path(source))
    print(f"{notebook_path(source).relative_to(ROOT)}: {len(notebook.cells)} cells, {time.monotonic() - began:.0f} s")


def differences(source: Path) -> list[str]:
    """What a source and its notebook disagree on, in words; nothing if they are in step."""
    path = notebook_path(source)
    if not path.is_file():
        return [f"{path.name} is missing"]
    wanted, found = read_source(source), nbformat.read(path, as_version=4)
    if len(wanted.cells) != len(found.cells):
        return [f"{path.name} has {len(found.cells)} cells, its source {len(wanted.cells)}"]
    said = []
    for number, (want, have) in enumerate(zip(wanted.cells, found.cells, strict=True)):
        for what, mine, theirs in (
            ("kind", want.cell_type, have.cell_type),
            ("text", want.source, have.source),
            ("tags", tags(want), tags(have)),
        ):
            if mine != theirs:
                said.append(f"{path.name}, cell {number}: another {what} than in the source: {first_line(have)!r}")
    return said


def tags(cell: Any) -> list[str]:
    """A cell's tags, none if it has none."""
    return list(cell.metadata.get("tags", []))


def first_line(cell: Any) -> str:
    """Enough of a cell to find it by."""
    return str(cell.source).partition("\n")[0][:60]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "check"])
    parser.add_argument("numbers", nargs="*", metavar="NN", help="only these chapters (default: all)")
    args = parser.parse_args()
    sources = [path for path in source_paths() if not args.numbers or path.name[:2] in args.numbers]
    if not sources:
        parser.error(f"no source for {' '.join(args.numbers)} in {SOURCES}")
    if args.command == "build":
        for source in sources:
            build(source)
        return 0
    said = [line for source in sources for line in differences(source)]
    for line in said:
        print(f"{line}; run make notebooks")
    return bool(said)


if __name__ == "__main__":
    sys.exit(main())
