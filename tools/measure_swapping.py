"""Measures recompute against swap: many sequences in a pool that is too small for them.

``OMP_NUM_THREADS=1 python tools/measure_swapping.py`` prints a line for each mode: tokens per second and processor time of
the fastest round, and what the engine did. All modes give the same tokens, up to rounding.
"""

import argparse
import logging
import time
from typing import Any

from pagebrain import LLM, SamplingParams
from pagebrain.engine.trace import StepTotals


def measure(llm: LLM, prompts: list[list[int]], num_tokens: int) -> tuple[float, float, StepTotals]:
    """Output tokens per second of one round, its processor time in seconds, and its totals."""
    before = StepTotals.of(llm.engine.stats())
    began, began_cpu = time.monotonic(), time.process_time()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True), use_tqdm=False)
    seconds, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
    return len(prompts) * num_tokens / seconds, cpu_s, StepTotals.of(llm.engine.stats()).since(before)


def main() -> None:
    """Measure each mode, the rounds of all modes in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a GPT-2 size, with random weights (default: the bundled model)")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=96)
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--num-blocks", type=int, default=104, help="of 16 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefix-caching", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    prompts = [[(7919 * row + 31 * column) % 1000 for column in range(args.input_len)] for row in range(args.requests)]
    shared: dict[str, Any] = {"num_blocks": args.num_blocks, "swap_space_gib": 1}
    if args.model is not None:
        shared |= {"model": args.model, "load_format": "dummy"}
    engines = {
        mode: LLM(**shared, max_num_seqs=args.requests, preemption_mode=mode, prefix_caching=args.prefix_caching)
        for mode in ("recompute", "swap", "auto")
    }
    best: dict[str, tuple[float, float, StepTotals]] = {}
    for _ in range(args.rounds):
        for mode, llm in engines.items():
            found = measure(llm, prompts, args.output_len)
            best[mode] = max(best.get(mode, found), found, key=lambda pair: pair[0])
    for mode, (rate, cpu_s, totals) in best.items():
        costs = engines[mode].engine.cache_manager.swap_space.costs
        did = f"{totals.num_preemptions} preemptions, {totals.num_prefill_tokens} tokens prefilled"
        moved = f"{totals.num_swapped_out_blocks} blocks out, {totals.num_swapped_in_blocks} in"
        rates = (
            f"a block {(costs.swap_block_s or 0) * 1e6:.0f} us, a prompt token {(costs.prefill_token_s or 0) * 1e6:.0f} us"
        )
        print(f"{mode:9}: {rate:6.1f} tokens/s, {cpu_s:.2f} s of processor, {did}, {moved}; {rates}")


if __name__ == "__main__":
    main()
