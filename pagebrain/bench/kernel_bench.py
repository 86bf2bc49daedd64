"""``pagebrain bench kernels``: the speed of the attention kernels, as a share of what the GPU's memory and arithmetic allow.

Each launch is checked against the torch path. Then many launches are captured in a CUDA graph, so that no launch waits for
Python, and replayed; medians are reported. Consecutive launches read different blocks, together several times the L2 cache,
as the layers of a model do. A copy and a matrix product measured in the same run are the roofs: below the ridge, a kernel
can be no faster than operations per byte times bytes per second, and beyond it no faster than the product (Williams,
Waterman and Patterson, "Roofline: an insightful visual performance model", 2009). :func:`pagebrain.viz.roofline` draws them.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pagebrain.bench.command import check_at_least_1, check_files, new_table, report_head, require
from pagebrain.bench.decode_steps import gpu_seconds, measure_copy
from pagebrain.bench.machine_facts import versions
from pagebrain.errors import ConfigError, PageBrainError
from pagebrain.kernels.version import installed

_L2_TIMES = 4
_MIN_LAUNCHES, _MAX_SETS = 16, 512
_PRODUCT_SIZE = 8192
_PREFILLS = ((1, 512), (8, 512))
"""Number of prompts, and tokens of each."""


def add_kernels_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pagebrain bench kernels``."""
    parser.add_argument("--batch", default="1,8,64,256", metavar="N,...", help="sequences (default: 1,8,64,256)")
    parser.add_argument("--context", default="128,512,960", metavar="N,...", help="tokens cached (default: 128,512,960)")
    parser.add_argument("--heads", type=int, default=12, metavar="N", help="query heads (default: 12)")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="heads of K and V (default: as many)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N", help="numbers of a head (default: 64)")
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="slots of a block (default: 16)")
    parser.add_argument("--max-model-len", type=int, default=1024, metavar="N", help="width of a table (default: 1024)")
    parser.add_argument("--dtype", default="bfloat16", metavar="NAME", help="float32, bfloat16, float16 (default: bfloat16)")
    parser.add_argument("--replays", type=int, default=20, metavar="N", help="timed replays of each graph (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the numbers and of the block order")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the roofline, as .png or .svg (needs matplotlib)")


def run_kernels(args: argparse.Namespace) -> int:
    """Measure, print, write the JSON. Raises ``ConfigError`` before anything is run, also if there is no GPU."""
    report = KernelBench(args).run()
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_kernel_report(report, Console())
    if args.chart is not None:
        draw_roofline(report, args.chart)
    return 0


@dataclass(frozen=True)
class Shape:
    """The sizes that all launches share: those of the model's attention, and the block size."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    itemsize: int

    def kv_bytes(self, num_seqs: int, context_len: int) -> int:
        """Bytes of K and V that one launch must read."""
        return 2 * num_seqs * context_len * self.num_kv_heads * self.head_dim * self.itemsize

    def flops(self, num_seqs: int, query_len: int, context_len: int) -> int:
        """Operations of a launch whose queries are the last ``query_len`` tokens of the context: two causal products."""
        seen = query_len * context_len - query_len * (query_len - 1) // 2
        return 4 * num_seqs * self.num_heads * self.head_dim * seen


class KernelBench:
    """One benchmark on torch's current GPU. Its options are checked when it is made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.batches = _positive_numbers("--batch", args.batch)
        self.contexts = _positive_numbers("--context", args.context)
        check_at_least_1(args, "heads", "kv_heads", "head_dim", "block_size", "max_model_len", "replays")
        if max(self.contexts) > args.max_model_len:
            raise ConfigError(f"--context goes to {max(self.contexts)}: use --max-model-len {max(self.contexts)} at least")
        check_files(args)
        if args.chart is not None:
            require("matplotlib", "--chart")

        import torch

        from pagebrain.attention.triton_backend import TritonBackend
        from pagebrain.config import DTYPES

        if args.dtype not in DTYPES:
            raise ConfigError(f"--dtype knows {', '.join(DTYPES)}; got {args.dtype!r}")
        self.dtype = DTYPES[args.dtype]
        if not torch.cuda.is_available():
            raise ConfigError(
                "pagebrain bench kernels measures the Triton kernels on a CUDA GPU, and torch finds none here: run it on a "
                "machine with one; pagebrain bench offline measures the engine anywhere"
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        reason = TritonBackend.reason_against(self.device, self.dtype, args.head_dim)
        if reason is not None:
            raise ConfigError(reason)
        self.shape = Shape(
            args.heads, args.kv_heads or args.heads, args.head_dim, args.block_size, torch.finfo(self.dtype).bits // 8
        )
        self.l2_bytes: int = torch.cuda.get_device_properties(self.device).L2_cache_size

    def run(self) -> dict[str, Any]:
        """The report that ``--json`` writes. Times in seconds, rates per second."""
        import torch

        torch.manual_seed(self.args.seed)
        copy_bytes_per_s = measure_copy(str(self.device))  # without a graph, which would use the slower copy engines
        if copy_bytes_per_s is None:
            raise ConfigError("there is no room on the GPU to measure a copy: stop other programs on it")
        product_flops_per_s = self._product()
        decode = [self._decode(num_seqs, context) for num_seqs in self.batches for context in self.contexts]
        for row in decode:
            row["share_of_copy"] = row["kv_bytes_per_s"] / copy_bytes_per_s
        prefill = [self._attention(num_seqs, query_len, query_len) for num_seqs, query_len in _PREFILLS]
        return report_head("kernels") | {
            "versions": versions(str(self.device)) | {"triton": installed(), "cuda": str(torch.version.cuda)},
            "shape": vars(self.shape) | {"dtype": self.args.dtype, "max_model_len": self.args.max_model_len},
            "replays": self.args.replays,
            "copy_bytes_per_s": copy_bytes_per_s,
            "product_flops_per_s": product_flops_per_s,
            "decode": decode,
            "prefill": prefill,
        }

    def _decode(self, num_seqs: int, context_len: int) -> dict[str, Any]:
        """One query for each of ``num_seqs`` sequences of ``context_len`` tokens."""
        row = self._attention(num_seqs, 1, context_len)
        row["kv_bytes"] = self.shape.kv_bytes(num_seqs, context_len)
        row["kv_bytes_per_s"] = row["kv_bytes"] / row["seconds"]
        return row

    def _attention(self, num_seqs: int, query_len: int, context_len: int) -> dict[str, Any]:
        """Check and time attention of the last ``query_len`` tokens of each sequence."""
        import torch

        from pagebrain.attention.torch_backend import paged_attention
        from pagebrain.kernels import paged

        sets = self.make_sets(num_seqs, query_len, context_len)
        num_decodes = num_seqs if query_len == 1 else 0
        scale = self.shape.head_dim**-0.5

        triton_attention: Any = paged.paged_attention
        torch_attention: Any = paged_attention

        def launch(index: int) -> Any:
            return triton_attention(*sets.inputs(index), scale, num_decodes=num_decodes)

        found, wanted = launch(0), torch_attention(*sets.inputs(0), scale)
        error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
        if not error < 4 * torch.finfo(self.dtype).eps + 1e-5:
            raise PageBrainError(
                f"attention of {num_seqs} sequences, {query_len} of {context_len} tokens, differs from the torch path by "
                f"{error:.2g}: the kernels are wrong on this machine, and nothing is timed"
            )
        seconds = self.time(launch, sets.num_sets)
        flops = self.shape.flops(num_seqs, query_len, context_len)
        moved = self.shape.kv_bytes(num_seqs, context_len) + 2 * sets.query_bytes
        return {
            "num_seqs": num_seqs,
            "query_len": query_len,
            "context_len": context_len,
            "seconds": seconds,
            "flops_per_s": flops / seconds,
            "intensity": flops / moved,
            "num_sets": sets.num_sets,
            "relative_error": error,
        }

    def make_sets(self, num_seqs: int, query_len: int, context_len: int) -> "InputSets":
        """Inputs for consecutive launches. K and V of all sets are together several times as large as the L2 cache."""
        kv_bytes = self.shape.kv_bytes(num_seqs, context_len)
        num_sets = max(2, min(_MAX_SETS, -(-_L2_TIMES * self.l2_bytes // kv_bytes)))
        return InputSets(self.shape, self.dtype, self.device, num_sets, num_seqs, query_len, context_len, self.args)

    def time(self, launch: Callable[[int], object], num_sets: int) -> float:
        """Median seconds of a launch, in a graph of at least ``_MIN_LAUNCHES`` launches that uses all sets in turn."""
        import torch

        num_launches = num_sets * -(-_MIN_LAUNCHES // num_sets)
        for index in range(num_sets):  # kernels cannot be compiled during capture
            launch(index)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(num_launches):
                launch(index % num_sets)
        graph.replay()
        return statistics.median(gpu_seconds(graph.replay) for _ in range(self.args.replays)) / num_launches

    def _product(self) -> float:
        """Operations per second of a large matrix product in this dtype."""
        import torch

        a, b = (torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, dtype=self.dtype, device=self.device) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * _PRODUCT_SIZE**3 / self.time(lambda _: torch.mm(a, b, out=out), 1)


class InputSets:
    """One pool of random K and V in the engine's layout, and for each set the block tables to its own blocks."""

    def __init__(
        self,
        shape: Shape,
        dtype: Any,
        device: Any,
        num_sets: int,
        num_seqs: int,
        query_len: int,
        context_len: int,
        args: argparse.Namespace,
    ) -> None:
        import torch

        pages = -(-context_len // shape.block_size)
        num_blocks = num_sets * num_seqs * pages
        pool = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        self.pools = [torch.randn(pool, dtype=dtype, device=device).transpose(1, 2) for _ in range(2)]
        width = -(-args.max_model_len // shape.block_size) if query_len == 1 else pages
        self.tables = torch.zeros(num_sets, num_seqs, width, dtype=torch.int64, device=device)
        order = torch.randperm(num_blocks, device=device)
        self.tables[:, :, :pages] = order.view(num_sets, num_seqs, pages)
        num_tokens = num_seqs * query_len
        self.queries = torch.randn(num_sets, num_tokens, shape.num_heads, shape.head_dim, dtype=dtype, device=device)
        self.context_lens = torch.full((num_seqs,), context_len, device=device)
        self.query_starts = torch.arange(0, num_tokens + 1, query_len, device=device)
        self.num_sets = num_sets
        self.query_bytes = self.queries[0].numel() * shape.itemsize

    def inputs(self, index: int) -> tuple[Any, ...]:
        """The arguments of ``paged_attention`` up to ``query_starts``."""
        return (self.queries[index], *self.pools, self.tables[index], self.context_lens, self.query_starts)


def _positive_numbers(option: str, text: str) -> list[int]:
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in numbers):
        raise ConfigError(f"{option} takes positive numbers with commas between them, got {text!r}")
    return [int(part) for part in numbers]


def roof(intensity: float, bytes_per_s: float, flops_per_s: float) -> float:
    """Most operations per second of a kernel with ``intensity`` operations per byte."""
    return min(intensity * bytes_per_s, flops_per_s)


def print_kernel_report(report: dict[str, Any], console: Console) -> None:
    """The roofs in a line, then a table with a row for each shape."""
    shape, roofs = report["shape"], (report["copy_bytes_per_s"], report["product_flops_per_s"])
    console.print(
        f"{report['versions'].get('gpu', 'GPU')}: a copy moves {roofs[0] / 1e12:.2f} TB/s, a matrix product computes "
        f"{roofs[1] / 1e12:.0f} TFLOP/s, the ridge is at {roofs[1] / roofs[0]:.0f} FLOP/byte; {shape['num_heads']} heads of "
        f"{shape['head_dim']} over {shape['num_kv_heads']} of K and V, {shape['dtype']}, blocks of {shape['block_size']}; "
        f"medians of {report['replays']} replays",
        highlight=False,
    )
    speeds = ("time", "K and V", "TB/s", "of a copy", "TFLOP/s", "FLOP/byte", "of the roof")
    table = new_table("sequences", "queries", "context", *speeds, num_left=0)
    for row in [*report["decode"], *report["prefill"]]:
        read = ["", "", ""]
        if "kv_bytes" in row:
            read = [f"{row['kv_bytes'] / 1e6:,.1f} MB", f"{row['kv_bytes_per_s'] / 1e12:.2f}", f"{row['share_of_copy']:.0%}"]
        sizes = [str(row[name]) for name in ("num_seqs", "query_len", "context_len")]
        speed = [f"{row['flops_per_s'] / 1e12:.1f}", f"{row['intensity']:.3g}"]
        share = row["flops_per_s"] / roof(row["intensity"], *roofs)
        table.add_row(*sizes, f"{row['seconds'] * 1e6:,.1f} us", *read, *speed, f"{share:.0%}")
    console.print(table)


def draw_roofline(report: dict[str, Any], file: Path) -> None:
    """Write the picture: the roofs, and a mark for each row; decode rows of one batch size are a series."""
    from pagebrain.viz import roofline

    series: dict[str, list[tuple[float, float]]] = {}
    for row in [*report["decode"], *report["prefill"]]:
        name = f"decode of {row['num_seqs']}" if "kv_bytes" in row else "prefill"
        series.setdefault(name, []).append((row["intensity"], row["flops_per_s"]))
    title = f"{report['versions'].get('gpu', 'GPU')}: attention kernels by sequences in the batch"
    roofline(series, report["copy_bytes_per_s"], report["product_flops_per_s"], title).save(file)
