"""Times the matrix products of one step of GPT-2 small on a CPU, with the weights as saved and as oneDNN reorders them.

``python tools/measure_packing.py --json docs/performance/packing-float32.json``; the reason why
``pagebrain/layers/linear.py`` packs weights.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pagebrain.bench.machine_facts import versions
from pagebrain.layers import Linear
from pagebrain.machine import available_cores

LAYER_SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
NUM_LAYERS = 12
HEAD_SHAPE = (768, 50257)
ROWS = (1, 8, 32, 128, 512)


def median_ms(step: Callable[[], None], repeats: int = 15) -> float:
    """Median time of ``step`` in milliseconds, after two calls that do not count."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        step()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])


def packed_linear(weight: Tensor) -> Linear:
    """A product with a weight ``[out_features, in_features]`` that oneDNN has reordered."""
    out_features, in_features = weight.shape
    product = Linear(in_features, out_features, bias=False)
    product.weight = nn.Parameter(weight, requires_grad=False)
    product.prepare(kernels=False, owned=True)
    return product


@torch.no_grad()
def main() -> None:
    """Measure and print, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to this file")
    args = parser.parse_args()
    threads = available_cores()
    torch.set_num_threads(threads)
    shapes = [*LAYER_SHAPES * NUM_LAYERS, HEAD_SHAPE]
    saved = [torch.randn(width_out, width_in) for width_in, width_out in shapes]
    packed = [packed_linear(weight) for weight in saved]
    results = []
    for rows in ROWS:
        inputs = {width: torch.randn(rows, width) for width in (768, 3072)}

        def as_saved(inputs: dict[int, Tensor] = inputs) -> None:
            for weight in saved:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        def reordered(inputs: dict[int, Tensor] = inputs) -> None:
            for weight, product in zip(saved, packed, strict=True):
                product(inputs[weight.shape[1]])

        results.append({"rows": rows, "as_saved_ms": median_ms(as_saved), "reordered_ms": median_ms(reordered)})
        print(results[-1])
    if args.json is not None:
        report = {"threads": threads, "dtype": "float32", "versions": versions("cpu"), "results": results}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
