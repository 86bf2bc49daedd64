"""Time the attention kernels over a grid of tilings and splits, on a GPU: which is fastest, and how far off is the default.

    python -m tools.tune_kernels --json FILE

The defaults are in ``pagebrain/kernels/decode_plan.py`` and ``triton_prefill.py``. Run on the machine that they are for.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pagebrain.bench.kernel_bench import KernelBench, add_kernels_arguments
from pagebrain.errors import PageBrainError

_PREFILLS = ((1, 512, 512), (8, 512, 512), (16, 32, 512), (64, 8, 512))
"""Sequences, queries and context: whole prompts, chunks over a prefix, and a few tokens each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Time everything, print the fastest of each shape beside the default, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_kernels_arguments(parser)
    args = parser.parse_args(argv)
    if args.chart is not None:
        parser.error("--chart belongs to pagebrain bench kernels: a grid of tilings has no roofline")
    try:
        bench = KernelBench(args)
    except PageBrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"device": str(bench.device), "shape": asdict(bench.shape), "decode": [], "prefill": []}
    for num_seqs, context_len in itertools.product(bench.batches, bench.contexts):
        report["decode"].append(show(f"decode {num_seqs} x {context_len}", *tune_decode(bench, num_seqs, context_len)))
    for num_seqs, query_len, context_len in _PREFILLS:
        label = f"prefill {num_seqs} x {query_len} of {context_len}"
        report["prefill"].append(show(label, *tune_prefill(bench, num_seqs, query_len, context_len)))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def show(label: str, default_s: float, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the three fastest trials of a shape, and return all of them, fastest first."""
    trials.sort(key=lambda trial: trial["seconds"])
    print(f"{label}: default {default_s * 1e6:.1f} us", flush=True)
    for trial in trials[:3]:
        settings = ", ".join(f"{name}={value}" for name, value in trial.items() if name != "seconds")
        print(f"    {trial['seconds'] * 1e6:8.1f} us  {settings}", flush=True)
    return {"label": label, "default_s": default_s, "trials": trials}


def tune_decode(bench: KernelBench, num_seqs: int, context_len: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the default, and of every tiling with every number of splits."""
    from pagebrain.kernels.paged import paged_decode

    sets, scale = bench.make_sets(num_seqs, 1, context_len), bench.shape.head_dim**-0.5

    def seconds(**options: Any) -> float:
        decode: Any = paged_decode
        return bench.time(lambda index: decode(*sets.inputs(index)[:5], scale, **options), sets.num_sets)

    trials = []
    for tiling, num_splits in itertools.product(decode_tilings(), (1, 2, 4, 8, 11, 16, 32)):
        if num_splits > 1 and (num_seqs * num_splits > 1024 or num_splits * tiling.tile > 2 * context_len):
            continue  # more programs than could help, or splits with next to nothing to read
        trials.append(asdict(tiling) | {"num_splits": num_splits, "seconds": seconds(tiling=tiling, num_splits=num_splits)})
    return seconds(), trials


def decode_tilings() -> Iterator[Any]:
    """The grid for one query head per K/V head; grouped heads need at least 16 tokens and gain from more warps."""
    from pagebrain.kernels.decode_plan import DecodeTiling

    for tile, num_warps, num_stages, unroll in itertools.product((16, 32, 64), (1, 2, 4), (1, 2, 3), (1, 2)):
        if tile >= 16 * num_warps and not (num_stages > 1 and unroll > 1):
            yield DecodeTiling(tile, num_warps, num_stages, unroll)


def tune_prefill(bench: KernelBench, num_seqs: int, query_len: int, context_len: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the default, and of every tiling that fits the GPU."""
    from triton.runtime.errors import OutOfResources

    from pagebrain.kernels.paged import paged_prefill
    from pagebrain.kernels.prefill import PrefillTiling

    sets, scale = bench.make_sets(num_seqs, query_len, context_len), bench.shape.head_dim**-0.5

    def seconds(**options: Any) -> float:
        prefill: Any = paged_prefill
        return bench.time(lambda index: prefill(*sets.inputs(index), scale, **options), sets.num_sets)

    trials = []
    for block_m, block_n, num_warps, num_stages in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)):
        tiling = PrefillTiling(block_m, block_n, num_warps, num_stages)
        if num_warps == 8 and block_m < 128:
            continue
        try:
            trials.append(asdict(tiling) | {"seconds": seconds(tiling=tiling)})
        except OutOfResources:  # of shared memory
            continue
    return seconds(), trials


if __name__ == "__main__":
    sys.exit(main())
