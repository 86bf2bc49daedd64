"""Record what CPU and GPU do in a decode step of chapter 07, in three ways, on a CUDA GPU; less than a minute.

    python -m tools.record_timeline --json docs/performance/timeline.json

The notebook of chapter 07 draws the file, and records anew where there is a GPU.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from chapters.aids import timeline


def main(argv: Sequence[str] | None = None) -> int:
    """Record, say what was found, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], metavar="N", help="sequences in a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was recorded")
    args = parser.parse_args(argv)
    words = ["python", "-m", "tools.record_timeline", *(sys.argv[1:] if argv is None else argv)]
    try:
        report = timeline.record(args.batch, shlex.join(words))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        args.json.write_text(timeline.to_json(report), encoding="utf-8")
        print(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
