"""What the three benchmark commands share: checks of options, the head of a report, lines and tables on a terminal."""

import argparse
import datetime
import shlex
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pagebrain.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def check_at_least_1(args: argparse.Namespace, *names: str) -> None:
    """Raise ``ConfigError`` if one of these options is given and less than 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def check_files(args: argparse.Namespace) -> None:
    """Raise ``ConfigError`` if ``--json`` or ``--chart`` cannot be written. It is called before the measurement."""
    chart = getattr(args, "chart", None)
    for option, path in (("--json", args.json), ("--chart", chart)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{option} {path} cannot be written: name a file in a folder that exists")
    if chart is not None and chart.suffix not in (".png", ".svg"):
        raise ConfigError(f"--chart must name a .png or .svg file, got {chart}")


def require(package: str, what: str) -> None:
    """Raise ``ConfigError`` if ``package``, which ``what`` needs, is not installed."""
    if find_spec(package) is None:
        raise ConfigError(f"{what} needs the package {package}: pip install 'pagebrain[bench]'")


def report_head(benchmark: str) -> dict[str, str]:
    """The first entries of a report: the benchmark's name, the date, the command line without the API key."""
    command = shlex.join(["pagebrain", *_without_key(sys.argv[1:])])
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "date": date, "command": command}


def _without_key(arguments: list[str]) -> list[str]:
    """The arguments with ``***`` for the API key, also where the option is abbreviated."""
    hidden: list[str] = []
    for previous, argument in zip(["", *arguments], arguments):
        name, equals, _ = argument.partition("=")
        if _is_api_key(previous):
            hidden.append("***")
        else:
            hidden.append(f"{name}=***" if equals and _is_api_key(name) else argument)
    return hidden


def _is_api_key(option: str) -> bool:
    return option.startswith("--ap") and "--api-key".startswith(option)


def say(console: "Console", text: str) -> None:
    """Print a line as it is, without colours or line breaks."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def new_table(*headings: str, num_left: int = 1) -> "Table":
    """An empty table. The first ``num_left`` columns are texts, the others are numbers."""
    from rich.table import Table

    table = Table(header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < num_left else "right", no_wrap=number >= num_left)
    return table
