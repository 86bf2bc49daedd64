"""The command line: ``pagebrain generate``, ``demo``, ``doctor`` and ``bench``, one module each.

:func:`main` picks the command and turns what can go wrong into one line and an exit status: 2 for a mistake in the input,
1 for a step that failed (in a swapped part, say), 130 when interrupted. Nothing here imports torch before a command needs
it, so that ``--help`` answers at once.
"""

import argparse
import contextlib
import importlib
import io
import os
import shutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from pagebrain import __version__
from pagebrain.cli.quiet import quiet
from pagebrain.errors import BlockError, BlockTableError, IntegrityError, PageBrainError, StepError

COMMANDS = {
    "generate": "continue a prompt and print the text as it is generated",
    "demo": "stream a story from the bundled model, and show where its K and V lie",
    "doctor": "look at this machine: what is there, and what to do about what is not",
    "bench": "measure throughput and latency",
}
"""Command -> what it does; each is a module of this package with ``add_arguments(parser)`` and ``run(args) -> int``."""

_EXAMPLES = """\
examples:
  pagebrain demo
  pagebrain generate "Once upon a time" --max-tokens 60 --temperature 0.8 --seed 1
  echo "Once upon a time" | pagebrain generate --json
  pagebrain generate "Hello" --model openai-community/gpt2
"""

INTERNAL_ERROR = 1
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help stays readable however many options there are."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        print(f"pagebrain: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns - 2))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a story may hold characters that the terminal has not
    try:
        with quiet():
            status = _run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # a closed pipe should be noticed here, not by the interpreter on its way out
            return status
    except (StepError, IntegrityError, BlockError, BlockTableError) as error:  # not the user's mistake, but a part's
        _fail(str(error))
        return INTERNAL_ERROR
    except PageBrainError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("rich", "tokenizers", "torch", "transformers"):
            raise
        return _fail(f"the package {error.name} is not installed: pip install {error.name}, then pagebrain doctor")
    except KeyboardInterrupt:
        print("pagebrain: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return PIPE_CLOSED
    except OSError as error:  # a full disk, say
        _discard_output()
        return _fail(str(error))


def _discard_output() -> None:
    """Send what is still buffered nowhere, or the interpreter would fail over it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    parser = _parser(arguments)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # help, version, or an error that the parser has reported
        return int(stop.code or 0)
    if args.command is None:
        parser.print_help()
        return 0
    return int(_module(args.command).run(args))


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser with the options of the command in ``arguments``; those of the others are not needed, nor their modules."""
    parser = OneLineParser(
        prog="pagebrain",
        description="Serve GPT-2 with PagedAttention, and see how it works.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"pagebrain {__version__}")
    subparsers = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for command, summary in COMMANDS.items():
        subparser = subparsers.add_parser(command, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if command == wanted:
            _module(command).add_arguments(subparser)
    return parser


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"pagebrain.cli.{command}")


def _fail(message: str) -> int:
    print(f"pagebrain: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR
