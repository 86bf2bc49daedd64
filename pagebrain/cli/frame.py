"""The frame of all command lines in this repository: commands are modules, and errors are one line.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> int``. It is imported only when it is called, so that
``--help`` is fast.
"""

import argparse
import contextlib
import importlib
import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from pagebrain.errors import is_out_of_memory
from pagebrain.machine import available_memory, memory_limits
from pagebrain.quiet import quiet
from pagebrain.standard_streams import reserve_descriptors, unfailing_stderr

INTERNAL_ERROR = 1
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE

OWN_PACKAGES = ("pagebrain", "chapters")
"""Packages that a user cannot install: a missing module of these is a bug."""

_OWN_OPTIONS = ("-h", "--help", "--version")
"""Options of the program itself, without a command."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser with one-line errors and wide help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(f"{message} (see {self.prog} --help)")


class _WrongUsage(Exception):
    """The command line cannot be parsed; the message says why."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns - 2))


@dataclass(frozen=True)
class CommandLine:
    """A program with commands.

    Attributes:
        name: the first word of its error messages.
        prog, description, epilog: of its help.
        commands: command -> its description, in the order of the help.
        module: name of a command's module, such as ``pagebrain.cli.{}``.
        mistakes: exceptions for mistakes in the input: one line, exit status 2.
        internal: exceptions that are no mistake in the input: one line, exit status 1.
        version: the text of ``--version``, if there is this option.
        advice: added to the error for a missing package.
        default: the command if only options are given.
        address_space_bytes: least ``ulimit -v`` of a command. With less, libraries abort without a message.
    """

    name: str
    prog: str
    description: str
    epilog: str
    commands: Mapping[str, str]
    module: str
    mistakes: tuple[type[Exception], ...]
    internal: tuple[type[Exception], ...] = ()
    version: str | None = None
    advice: str = ""
    default: str | None = None
    address_space_bytes: int = 0

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run one command line and return its exit status."""
        reserve_descriptors()
        with unfailing_stderr():
            return self._main(argv)

    def _main(self, argv: Sequence[str] | None) -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        if self.default is not None and arguments and arguments[0].startswith("-") and arguments[0] not in _OWN_OPTIONS:
            arguments.insert(0, self.default)
        mistakes: tuple[type[Exception], ...] = (_WrongUsage, *self.mistakes)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # text may have characters that the terminal's encoding lacks
        try:
            with quiet():
                status = self._run(arguments)
                if sys.stdout is not None:
                    sys.stdout.flush()  # so that a closed pipe raises here, not when the interpreter exits
                return status
        except self.internal as error:
            return self._fail(str(error), INTERNAL_ERROR)
        except mistakes as error:
            return self._fail(str(error))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in OWN_PACKAGES:
                raise
            return self._fail(f"the package {error.name} is not installed: pip install {error.name}{self.advice}")
        except KeyboardInterrupt:
            print(f"{self.name}: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            _discard_output()
            return PIPE_CLOSED
        except SystemExit as stop:
            if isinstance(stop.__context__, BrokenPipeError):  # rich raises SystemExit for a closed pipe
                _discard_output()
                return PIPE_CLOSED
            raise
        except OSError as error:  # for instance a full disk
            _discard_output()
            return self._fail(str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            return self._fail(f"not enough memory: {available_memory()}: {reason}; raise the limit, or ask for less")

    def _run(self, arguments: list[str]) -> int:
        parser = self._parser(arguments)
        try:
            args = parser.parse_args(arguments)
        except SystemExit as stop:  # help or version
            return int(stop.code or 0)
        if args.command is None:
            parser.print_help()
            return 0
        if sys.flags.optimize > 1:
            raise _WrongUsage(
                "Python runs with -OO (PYTHONOPTIMIZE=2), and transformers reads docstrings, which that leaves out: "
                "unset PYTHONOPTIMIZE, or set it to 1"
            )
        limits = [limit for limit in memory_limits() if limit.name == "ulimit -v"]
        if limits and limits[0].total_bytes < self.address_space_bytes:
            raise MemoryError(f"torch and a small model take {self.address_space_bytes / 1e9:.2f} GB of address space")
        return int(self._module(args.command).run(args))

    def _parser(self, arguments: list[str]) -> argparse.ArgumentParser:
        """The parser. Only the command in ``arguments`` gets its options, so that the others are not imported."""
        parser = OneLineParser(prog=self.prog, description=self.description, epilog=self.epilog)
        if self.version is not None:
            parser.add_argument("--version", action="version", version=self.version)
        subparsers = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
        wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
        for command, summary in self.commands.items():
            subparser = subparsers.add_parser(command, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
            if command == wanted:
                self._module(command).add_arguments(subparser)
        return parser

    def _module(self, command: str) -> ModuleType:
        return importlib.import_module(self.module.format(command))

    def _fail(self, message: str, status: int = USAGE_ERROR) -> int:
        print(f"{self.name}: error: {' '.join(message.split())}", file=sys.stderr)
        return status


def _discard_output() -> None:
    """Discard buffered output. Otherwise the interpreter would try to write it at exit, and fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
