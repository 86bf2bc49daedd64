"""``python -m chapters``: the course tool. ``python path/to/chapters`` works from any folder."""

import sys
from pathlib import Path

if not __package__:  # run as a folder: Python put this folder on the path, not the one that it is in
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from chapters.course.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
