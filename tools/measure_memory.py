"""Measures how the memory of an engine on a CPU grows over thousands of requests of many lengths.

``OMP_NUM_THREADS=1 python tools/measure_memory.py --requests 3000``; the reason for ``padded_rows`` in
``pagebrain/layers/linear.py``. Prompts and answers have random lengths, so that steps of very many shapes are computed.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from pagebrain import LLM, SamplingParams
from pagebrain.bench.machine_facts import versions


def resident_mib() -> float:
    """Resident memory of this process in MiB (Linux)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS:"))


def main() -> None:
    """Serve the requests, print a line for each ``--every`` of them, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="default: the bundled model")
    parser.add_argument("--load-format", default="auto", help="auto or dummy (default: auto)")
    parser.add_argument("--dtype", default="float32", metavar="NAME")
    parser.add_argument("--num-blocks", type=int, default=1024, metavar="N", help="blocks of the cache (default: 1024)")
    parser.add_argument("--requests", type=int, default=12_000, metavar="N", help="(default: 12000)")
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="requests under way (default: 8)")
    parser.add_argument("--max-prompt", type=int, default=300, metavar="N", help="longest prompt (default: 300)")
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="longest answer (default: 16)")
    parser.add_argument("--every", type=int, default=500, metavar="N", help="requests between two lines (default: 500)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to this file")
    args = parser.parse_args()
    llm = LLM(args.model, load_format=args.load_format, dtype=args.dtype, device="cpu", num_blocks=args.num_blocks)
    engine, draw = llm.engine, random.Random(0)
    vocab_size = llm.config.vocab_size or 1
    results: list[dict[str, Any]] = [{"requests": 0, "cpu_seconds": 0.0, "resident_mib": round(resident_mib(), 1)}]
    print(results[-1], flush=True)
    began, num_added, num_ended = time.process_time(), 0, 0
    while num_ended < args.requests:
        while num_added < args.requests and engine.num_unfinished_requests < args.at_once:
            prompt = [draw.randrange(vocab_size) for _ in range(draw.randint(1, args.max_prompt))]
            params = SamplingParams(temperature=draw.choice((0.0, 1.0)), max_tokens=draw.randint(1, args.max_tokens))
            engine.add_request(prompt, params, wants_deltas=False)
            num_added += 1
        before = num_ended
        num_ended += sum(delta.finished is not None for delta in engine.step())
        if num_ended // args.every > before // args.every:
            seconds = round(time.process_time() - began, 1)
            results.append({"requests": num_ended, "cpu_seconds": seconds, "resident_mib": round(resident_mib(), 1)})
            print(results[-1], flush=True)
    if args.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        report = {"command": sys.argv, "settings": settings, "versions": versions("cpu"), "results": results}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
