"""What ``pagebrain bench kernels`` measured, for people: a table, and the roofline with every row as a mark."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pagebrain.bench.roofline import Point, draw

_MARKS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def print_kernel_report(report: dict[str, Any], console: Console) -> None:
    """The tables and the roofline."""
    shape, copy = report["shape"], report["copy_bytes_per_s"]
    console.print(
        f"{report['versions'].get('gpu', 'GPU')}: a copy moves {copy / 1e12:.2f} TB/s, a matrix product computes "
        f"{report['product_flops_per_s'] / 1e12:.0f} TFLOP/s; {shape['num_heads']} heads of {shape['head_dim']} over "
        f"{shape['num_kv_heads']} of K and V, {shape['dtype']}, blocks of {shape['block_size']}; medians of "
        f"{report['replays']} replays",
        highlight=False,
    )
    table = Table(header_style="bold")
    for heading in ("", "sequences", "queries", "context", "time", "K and V", "TB/s", "of a copy", "TFLOP/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    points = []
    for mark, row in zip(_MARKS, [*report["decode"], *report["prefill"]]):
        read = ["", "", ""]
        if "kv_bytes" in row:
            read = [f"{row['kv_bytes'] / 1e6:,.1f} MB", f"{row['kv_bytes_per_s'] / 1e12:.2f}", f"{row['share_of_copy']:.0%}"]
        sizes = [str(row[name]) for name in ("num_seqs", "query_len", "context_len")]
        table.add_row(mark, *sizes, f"{row['seconds'] * 1e6:,.1f} us", *read, f"{row['flops_per_s'] / 1e12:.1f}")
        points.append(Point(mark, row["intensity"], row["flops_per_s"]))
    console.print(table)
    console.print(draw(points, copy, report["product_flops_per_s"]), highlight=False, markup=False, soft_wrap=True)
