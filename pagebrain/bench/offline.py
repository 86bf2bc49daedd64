"""``pagebrain bench offline``: the same requests through PageBrain and Hugging Face, in interleaved rounds.

This module checks the arguments, makes the workload, chooses each engine's settings and runs the engines: A B C, A B C,
A B C. Each run has a process of its own, so that no run inherits memory or threads. Because the rounds are interleaved, a
change in the machine's load affects all engines.
"""

import argparse
import heapq
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pagebrain.bench.child import RunResult, RunSpec, run_in_child
from pagebrain.bench.command import check_at_least_1, check_files, report_head
from pagebrain.bench.machine_facts import versions
from pagebrain.bench.offline_report import compare, engine_report, print_report
from pagebrain.bench.workload import (
    BenchRequest,
    LengthRange,
    Sampling,
    check_lengths,
    make_warmup,
    make_workload,
    model_limits,
)
from pagebrain.config import PageBrainConfig
from pagebrain.errors import ConfigError, InvalidRequestError, PageBrainError
from pagebrain.machine import available_cores

ENGINES = ("pagebrain", "hf-static", "hf-continuous")
"""All engines, in the order in which they run and are shown."""

HF_PAGE_SIZE = 32
"""Tokens in a page of Hugging Face's cache. It affects memory and not speed (Hugging Face's default is 256)."""


def candidates(engine: str, requests: Sequence[BenchRequest], device: str, max_num_seqs: int | None) -> list[dict[str, Any]]:
    """Settings for ``engine``, best known first. ``max_num_seqs`` limits the sequences in a step of every engine."""
    make = {"pagebrain": _pagebrain, "hf-static": _hf_static, "hf-continuous": _hf_continuous}[engine]
    return make(requests, device, max_num_seqs)


def _pagebrain(requests: Sequence[BenchRequest], device: str, max_num_seqs: int | None) -> list[dict[str, Any]]:
    if device != "cpu":  # the engine's defaults are those for a GPU
        return [{} if max_num_seqs is None else {"max_num_seqs": max_num_seqs}]
    seqs = max_num_seqs or 64
    longest = max(request.num_tokens for request in requests)
    settings: dict[str, Any] = {"max_num_seqs": seqs, "max_num_batched_tokens": max(512, seqs)}
    return [settings | {"num_blocks": _pages(requests, seqs, page_size=16), "max_model_len": longest, "block_size": 16}]


def _hf_static(requests: Sequence[BenchRequest], device: str, max_num_seqs: int | None) -> list[dict[str, Any]]:
    limit = min(len(requests), max_num_seqs or (32 if device == "cpu" else 256))
    best = {
        "attn_implementation": "sdpa",
        # A static cache is not copied at every step. On a GPU, generate would compile the model for each of its shapes.
        "cache": "static" if device == "cpu" else "dynamic",
        "batch_size": limit,
        "sort_by": "output_len",
    }
    half, quarter = limit // 2, limit // 4
    changes: list[dict[str, Any]] = [{}, {"batch_size": half}, {"batch_size": half, "sort_by": "input_len"}]
    changes += [{"batch_size": quarter}, {"attn_implementation": "eager"}]
    if device == "cpu":
        dynamic = {"cache": "dynamic"}
        changes += [dynamic, dynamic | {"batch_size": half}, dynamic | {"batch_size": half, "attn_implementation": "eager"}]
    return [best | change for change in changes if change.get("batch_size", limit) >= min(4, limit)]


def _hf_continuous(requests: Sequence[BenchRequest], device: str, max_num_seqs: int | None) -> list[dict[str, Any]]:
    limit = min(len(requests), max_num_seqs or (32 if device == "cpu" else 256))
    best: dict[str, Any] = {
        "attn_implementation": "sdpa",
        "max_requests_per_batch": limit,
        "max_batch_tokens": 2048,
        "page_size": HF_PAGE_SIZE,
        "scheduler_type": "prefill_first" if device == "cpu" else "fifo",
        "allow_block_sharing": False,  # no two prompts share a prefix
        "auto_switch_to_flash": False,
    }
    if device == "cpu":
        # The first-in-first-out scheduler admits no request while less than 15 % of the cache is free.
        best["num_blocks"] = int(_pages(requests, limit, HF_PAGE_SIZE) / 0.8) + 1
    changes: list[dict[str, Any]] = [{}]
    changes += [{"max_requests_per_batch": size} for size in (limit * 3 // 4, limit // 2) if size >= 4]
    changes += [
        {"max_batch_tokens": 512},
        {"scheduler_type": "fifo" if device == "cpu" else "prefill_first"},
    ]
    changes += [{"attn_implementation": "eager"}]
    if device != "cpu":
        changes += [{"use_cuda_graph": True}, {"attn_implementation": "flash_attention_2", "page_size": 256}]
    return [best | change for change in changes]


def _pages(requests: Sequence[BenchRequest], max_num_seqs: int, page_size: int) -> int:
    """Pages that the ``max_num_seqs`` longest requests fill."""
    return sum(heapq.nlargest(max_num_seqs, (-(-request.num_tokens // page_size) for request in requests)))


_MAX_WARMUP_REQUESTS = 256


def add_offline_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pagebrain bench offline``."""
    group = parser.add_argument_group("workload")
    group.add_argument("--requests", type=int, default=32, metavar="N", help="how many requests (default: 32)")
    group.add_argument("--input-len", default="32:128", metavar="LOW:HIGH", help="tokens of a prompt (default: 32:128)")
    group.add_argument("--output-len", default="32:128", metavar="LOW:HIGH", help="tokens to generate (default: 32:128)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the requests and of random weights (default: 0)")

    group.add_argument(
        "--request-rate", type=float, metavar="R", help="requests/s, Poisson arrivals in real time (default: all at once)"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the best token (default: 0)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the best tokens that add up to P")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens (default: all)")

    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="hub name or folder of a GPT-2 (default: the bundled story model)")
    group.add_argument("--load-format", default="auto", metavar="FORMAT", help="auto, or dummy for random weights")
    group.add_argument("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, ... (default: auto)")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")

    group = parser.add_argument_group("measurement")
    group.add_argument("--compare", default="", metavar="ENGINE,...", help="hf-static, hf-continuous (default: none)")
    group.add_argument("--rounds", type=int, default=3, metavar="N", help="interleaved rounds (default: 3)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of each engine (default: one for each core)")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="most sequences in one step, for every engine")
    group.add_argument("--tune", action="store_true", help="first find the fastest settings of the Hugging Face engines")
    group.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")


def run_offline(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON. Raises ``ConfigError`` or ``ModelLoadError`` before anything is run."""
    bench = OfflineBench(args)
    report = bench.run(Console(stderr=True))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report, Console())
    return 0


class OfflineBench:
    """One benchmark: the workload, the engines and their settings. Its options are checked when it is made."""

    def __init__(self, args: argparse.Namespace) -> None:
        check_at_least_1(args, "requests", "rounds", "threads", "max_num_seqs")
        check_files(args)
        self.args = args
        self.engines = parse_engines(args.compare)
        self.sampling = Sampling(args.temperature, args.top_p, args.top_k)
        self._check_options_of_pagebrain()
        self.input_len = LengthRange.parse("--input-len", args.input_len)
        self.output_len = LengthRange.parse("--output-len", args.output_len)
        config = PageBrainConfig(
            model=args.model, load_format=args.load_format, dtype=args.dtype, device=args.device, seed=args.seed
        )
        config = config.with_device_and_dtype()
        names = ("model", "load_format", "dtype", "device", "seed")
        self.model = {name: getattr(config, name) for name in names}
        vocab_size, num_positions = model_limits(config)
        check_lengths(self.input_len, self.output_len, num_positions)
        self.requests = make_workload(args.requests, self.input_len, self.output_len, vocab_size, args.seed)
        self.warmup = make_warmup(self.requests[:_MAX_WARMUP_REQUESTS], vocab_size, args.seed)
        self.threads: int = args.threads or available_cores()
        self._is_last_round = False
        self.candidates = {
            engine: candidates(engine, self.requests, config.device, args.max_num_seqs) for engine in self.engines
        }

    def _check_options_of_pagebrain(self) -> None:
        rate = self.args.request_rate
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"--request-rate must be greater than 0 and finite, got {rate}: leave it out for all at once")
        try:
            self.sampling.params([BenchRequest((0,), 1)])
        except InvalidRequestError as error:
            raise ConfigError(f"--temperature, --top-p or --top-k: {error}") from None
        for option, is_used in (("--temperature", not self.sampling.greedy), ("--request-rate", rate is not None)):
            if is_used and len(self.engines) > 1:
                raise ConfigError(
                    f"{option} is for PageBrain alone, the others are compared greedily and all at once: leave out --compare"
                )

    def run(self, console: Any) -> dict[str, Any]:
        """Run all rounds and return the report that ``--json`` writes. Progress goes to ``console``."""
        tuned = [engine for engine in self.engines if self.args.tune and len(self.candidates[engine]) > 1]
        total = self.args.rounds * len(self.engines) + sum(len(self.candidates[engine]) for engine in tuned)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            task = progress.add_task("starting", total=total)

            def run_once(engine: str, settings: dict[str, Any], label: str) -> RunResult:
                progress.update(task, description=f"{label}: {engine}")
                result = run_in_child(self._spec(engine, settings))
                progress.advance(task)
                return result

            trials = {engine: self._tune(engine, run_once) for engine in tuned}
            results: dict[str, list[RunResult]] = {engine: [] for engine in self.engines}
            for number in range(1, self.args.rounds + 1):
                self._is_last_round = number == self.args.rounds
                for engine in self.engines:
                    results[engine].append(run_once(engine, self.candidates[engine][0], f"round {number}"))
        return self._report(results, trials)

    def _spec(self, engine: str, settings: dict[str, Any]) -> RunSpec:
        return RunSpec(
            engine,
            self.model,
            self.threads,
            self.requests,
            self.warmup,
            settings,
            sampling=self.sampling,
            request_rate=self.args.request_rate,
            look_closer=engine == "pagebrain" and self._is_last_round,
        )

    def _tune(self, engine: str, run_once: Callable[[str, dict[str, Any], str], RunResult]) -> list[dict[str, Any]]:
        """Time each candidate once and put the fastest first. One that fails here is recorded and left out."""
        trials: list[dict[str, Any]] = []
        for settings in self.candidates[engine]:
            try:
                elapsed = run_once(engine, settings, "tuning").elapsed_s
            except PageBrainError as error:
                trials.append({"configuration": settings, "error": str(error)})
            else:
                trials.append({"configuration": settings, "output_tokens_per_s": self._output_tokens / elapsed})
        worked = [trial for trial in trials if "error" not in trial]
        if not worked:
            raise PageBrainError(f"{engine} ran with none of its settings: {trials[0]['error']}")
        worked.sort(key=lambda trial: -trial["output_tokens_per_s"])
        self.candidates[engine] = [trial["configuration"] for trial in worked]
        return trials

    @property
    def _output_tokens(self) -> int:
        return sum(request.output_len for request in self.requests)

    def _report(self, results: dict[str, list[RunResult]], trials: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        args = self.args
        workload = self.model | {
            "model": args.model or "bundled",
            "requests": args.requests,
            "input_len": str(self.input_len),
            "output_len": str(self.output_len),
            "input_tokens": sum(len(request.prompt_token_ids) for request in self.requests),
            "output_tokens": self._output_tokens,
            "ignore_eos": True,
            "max_num_seqs": args.max_num_seqs,
            "sampling": vars(self.sampling),
            "request_rate": args.request_rate,
        }
        return report_head("offline") | {
            "workload": workload,
            "threads": self.threads,
            "rounds": args.rounds,
            "versions": versions(self.model["device"]),
            "engines": {engine: engine_report(self.requests, runs, self.sampling) for engine, runs in results.items()},
            "comparison": compare(results),
            "tuning": trials,
        }


def parse_engines(compare: str) -> list[str]:
    """PageBrain first, then the named engines, each once. Raises ``ConfigError`` for an unknown name."""
    named = [name.strip() for name in compare.split(",") if name.strip()]
    for name in named:
        if name not in ENGINES:
            raise ConfigError(f"--compare knows {', '.join(ENGINES[1:])}; got {name!r}")
    return [engine for engine in ENGINES if engine == "pagebrain" or engine in named]
