"""Time the sampling kernels on a GPU: microseconds of one launch sequence, from logits to tokens, under a CUDA graph.

    python -m tools.time_sampling [--rows 1,64,256] [--json FILE]

The vocabulary is GPT-2's, 50,257 padded to 50,304 columns, in bfloat16. Flat logits are what random weights give (standard
deviation 0.3): a top-p of 0.95 keeps almost the whole vocabulary. Peaked ones (standard deviation 4) are nearer to a trained
model. The logits lie in the L2 cache as far as they fit, as they do when the product before has just written them.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE, PADDED_VOCAB = 50_257, 50_304
SPREADS = {"flat": 0.3, "peaked": 4.0}
LAUNCHES, REPLAYS = 10, 15

CASES: dict[str, dict[str, float]] = {
    "temperature 0.8": {},
    "min-p 0.05": {"log_min_p": -2.9957},
    "top-p 0.95": {"top_p": 0.95},
    "top-p 0.5": {"top_p": 0.5},
    "top-k 50": {"top_k": 50},
    "top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of medians, and write all of it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,64,256", help="rows of logits, separated by commas (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the times to this file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: torch finds no CUDA GPU; the kernels are timed nowhere else", file=sys.stderr)
        return 2
    times: list[dict[str, Any]] = []
    for num_rows in (int(text) for text in args.rows.split(",")):
        for name, spread in SPREADS.items():
            logits = (spread * torch.randn(num_rows, PADDED_VOCAB, device="cuda")).to(torch.bfloat16)
            for case, (microseconds, slowest) in time_cases(logits).items():
                times.append({"rows": num_rows, "logits": name, "case": case, "us": microseconds, "slowest_us": slowest})
                line = f"{num_rows:4} rows  {name:6}  {case:22}  {microseconds:8.1f} us  (slowest {slowest:8.1f})"
                print(line, flush=True)
    if args.json is not None:
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "times": times}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def time_cases(logits: Tensor) -> dict[str, tuple[float, float]]:
    """Median and slowest microseconds of each case, over replays with other random numbers."""
    from pagebrain.kernels.sample import SamplingRows, sample, sample_greedy

    num_rows = logits.shape[0]
    rows = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    token_ids = torch.zeros(num_rows, 1024, dtype=torch.int32, device="cuda")
    lens, out = torch.full_like(rows, 500), torch.zeros_like(rows)
    sampling = SamplingRows.make(num_rows, "cuda")
    inputs = (logits, VOCAB_SIZE, rows, lens, token_ids, out)
    found = {
        "greedy": timed(lambda: sample_greedy(*inputs), sampling.stream_key),
        "greedy rows, sampled": timed(lambda: sample(*inputs, sampling), sampling.stream_key),
    }
    for case, settings in CASES.items():
        sampling = SamplingRows.make(num_rows, "cuda")
        sampling.temperature.fill_(0.8)
        for name, value in settings.items():
            getattr(sampling, name).fill_(value)
        found[case] = timed(lambda: sample(*inputs, sampling), sampling.stream_key)  # noqa: B023
    return found


def timed(launch: Callable[[], None], stream_key: Tensor) -> tuple[float, float]:
    """Median and maximum of the microseconds that one of ``LAUNCHES`` in a graph takes."""
    launch()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            launch()
    graph.replay()
    new_event: Any = torch.cuda.Event
    times = []
    for _ in range(REPLAYS):
        stream_key.random_()
        start, end = new_event(enable_timing=True), new_event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times), max(times)


if __name__ == "__main__":
    sys.exit(main())
