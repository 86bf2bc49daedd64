"""What the closer look found, for people: the share of the memory roof, and where the time of a decode step went."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_closer(closer: Mapping[str, Any], console: Console) -> None:
    """One line on the roof, then the table of the parts of a step."""
    if "error" in closer:
        console.print(f"no closer look at the steps: {closer['error']}", highlight=False, markup=False, soft_wrap=True)
        return
    console.print(roof_line(closer["decode"]), highlight=False, markup=False, soft_wrap=True)
    window = closer["window"]
    if window is not None:
        line = f"where the {window['seconds'] * 1000:.2f} ms of a decode step go: {window['num_steps']} steps of "
        line += f"{window['num_seqs_mean']:.0f} sequences"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(step_table(window))
    if "not_recorded" in closer:
        line = f"the GPU's side was not recorded: {closer['not_recorded']}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def roof_line(decode: Mapping[str, Any] | None) -> str:
    """The bytes that decode steps moved, and their share of the roof, in words."""
    if decode is None:
        return "memory roof: no step was without prefill"
    moved = (
        f"memory roof: {decode['num_steps']} decode steps of {decode['num_seqs_mean']:.0f} sequences moved "
        f"{_bytes(decode['bytes'] / decode['num_steps'])} each (weights {_bytes(decode['weight_bytes'])}, and "
        f"{decode['kv_bytes_per_token']:,} bytes for each token of context) in "
        f"{decode['seconds'] / decode['num_steps'] * 1000:.2f} ms: {_bytes(decode['bytes_per_s'])}/s"
    )
    if decode["copy_bytes_per_s"] is None:
        return f"{moved}; there was no room to measure a copy"
    return f"{moved}, {decode['share']:.0%} of what a copy reaches here ({_bytes(decode['copy_bytes_per_s'])}/s)"


def step_table(window: Mapping[str, Any]) -> Table:
    """The parts of a step on the host and on the GPU; each side adds up to the step."""
    seconds = window["seconds"]
    table = Table(header_style="bold")
    table.add_column("where")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for where in ("host", "gpu"):
        for number, (part, value) in enumerate((window[where] or {}).items()):
            label = "" if number else {"host": "host", "gpu": "GPU"}[where]
            table.add_row(label, part, f"{value * 1000:.3f}", f"{value / seconds:.0%}", end_section=part in ("rest", "idle"))
    return table


def _bytes(count: float) -> str:
    """Two or three digits and a unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if count < 100 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} bytes"
