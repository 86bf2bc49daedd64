"""The command ``bench serve``: runs loads against a server, one after the other; with offline runs in between on request."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from pagebrain.bench.child import run_in_child
from pagebrain.bench.command import report_head
from pagebrain.bench.machine_facts import versions
from pagebrain.bench.serve.load import DEFAULT_CONCURRENCY, Load, check_options, parse_loads
from pagebrain.bench.serve.measurements import measure, parse_slo
from pagebrain.bench.serve.processes import DriveResult, Follow, drive_processes, progress_bar
from pagebrain.bench.serve.serve_report import check_all_done, compare, offline_spec, print_report, request_rows, to_json
from pagebrain.bench.serve.target import Target, launched
from pagebrain.bench.workload import BenchRequest, LengthRange, check_lengths, make_warmup, make_workload, model_limits
from pagebrain.config import PageBrainConfig
from pagebrain.machine import available_cores

DEFAULT_VOCAB_SIZE = 50257

_ROUND_SEED_STEP = 7919
"""Between the seeds of two runs against one server. So their prompts differ, and no prefix cache holds those of the next."""


def run_serve(args: argparse.Namespace) -> int:
    """Measure, write, print. Files come first, so that a closed pipe does not lose them. Returns 1 if no request was done.

    ``args.launch`` is a list of arguments for ``pagebrain serve``, and ``args.engine`` has the settings of the engine in it.

    Raises ``ConfigError`` before anything is sent or started.
    """
    bench = ServeBench(args)
    with _terminated_in_order():
        report = bench.run(Console(stderr=True))
    if args.json is not None:
        args.json.write_text(to_json(report), encoding="utf-8")
    runs = report["runs"]
    if args.chart is not None and any(run["metrics"]["done"] for run in runs):
        from pagebrain.bench.serve.latency_chart import latency_chart

        latency_chart(runs).save(args.chart)
    print_report(report, Console())
    return 0 if any(run["metrics"]["done"] for run in runs) else 1


class ServeBench:
    """One benchmark of a server. Its options are checked when it is made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.loads = parse_loads(args.concurrency, args.request_rate, args.sweep_concurrency, args.sweep)
        self.input_len = LengthRange.parse("--input-len", args.input_len)
        self.output_len = LengthRange.parse("--output-len", args.output_len)
        self.slo = parse_slo(args.slo) if args.slo else {}
        check_options(args, num_loads=len(self.loads))
        self.api_key: str | None = args.api_key or os.environ.get("PAGEBRAIN_API_KEY") or None
        self.target = Target.parse(args.url, self.api_key)
        self.launch_arguments: list[str] = args.launch or []
        self.engine: dict[str, Any] = args.engine
        self.threads: int | None = args.threads
        self.vocab_size: int | None = args.vocab_size
        if args.launch is not None:
            self._check_launch()
        if args.against_offline:
            self.threads = self.threads or available_cores()

    def _check_launch(self) -> None:
        vocab_size, num_positions = model_limits(PageBrainConfig(**self.engine))
        check_lengths(self.input_len, self.output_len, self.engine.get("max_model_len") or num_positions)
        self.vocab_size = self.vocab_size or vocab_size

    def run(self, progress_console: Any) -> dict[str, Any]:
        """Run all loads and return the report that ``--json`` writes."""
        comparison: dict[str, Any] | None = None
        with progress_bar(progress_console) as follow:
            if self.args.against_offline:
                runs, server, comparison = self._against_offline(follow)
            else:
                with self._server() as target:
                    server = self._describe(target)
                    runs = [
                        self._run_load(target, server, load, self._seed(number), follow)
                        for number, load in enumerate(self.loads)
                    ]
        return self._report(runs, server, comparison)

    def _seed(self, number: int) -> int:
        return int(self.args.seed) + number * _ROUND_SEED_STEP

    @contextlib.contextmanager
    def _server(self) -> Iterator[Target]:
        """The server, launched and stopped if ``--launch`` is given."""
        if self.args.launch is None:
            yield self.target
            return
        with launched(self.launch_arguments, api_key=self.api_key, threads=self.threads) as url:
            yield Target.parse(url, self.api_key)

    def _describe(self, target: Target) -> dict[str, Any]:
        """The server's model, URL and version. Raises ``ConfigError`` if the longest request does not fit the model."""
        entry = target.find_model(self.args.model)
        if isinstance(entry.get("max_model_len"), int):
            check_lengths(self.input_len, self.output_len, entry["max_model_len"])
        listed = entry.get("vocab_size")
        self.vocab_size = self.vocab_size or (listed if isinstance(listed, int) else DEFAULT_VOCAB_SIZE)
        launched = None if self.args.launch is None else shlex.join(self.launch_arguments)
        return {"model": entry["id"], "url": target.url, "version": target.version(), "launched_with": launched}

    def _workload(self, load: Load, seed: int) -> tuple[list[BenchRequest], list[BenchRequest]]:
        """The requests of a run and of its warm-up."""
        assert self.vocab_size is not None
        requests = make_workload(self.args.requests, self.input_len, self.output_len, self.vocab_size, seed)
        num_warmup = self.args.warmup if self.args.warmup is not None else load.concurrency or DEFAULT_CONCURRENCY
        return requests, make_warmup(requests[:num_warmup], self.vocab_size, seed)

    def _run_load(self, target: Target, server: dict[str, Any], load: Load, seed: int, follow: Follow) -> dict[str, Any]:
        """One run against a running server."""
        requests, warmup = self._workload(load, seed)
        result = drive_processes(
            target,
            [self._body(request, server["model"]) for request in requests],
            [self._body(request, server["model"]) for request in warmup],
            load,
            seed=seed,
            num_processes=self.args.processes,
            timeout_s=self.args.timeout,
            on_progress=lambda progress: follow(str(load), len(requests), progress),
        )
        return self._run_report(load, seed, requests, warmup, result)

    def _body(self, request: BenchRequest, model: str) -> bytes:
        """A completion request. All of its fields are OpenAI's, except ``ignore_eos``."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": request.prompt_token_ids,
            "max_tokens": request.output_len,
            "temperature": self.args.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.args.top_p is not None:
            body["top_p"] = self.args.top_p
        if self.args.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body).encode()

    def _run_report(
        self, load: Load, seed: int, requests: list[BenchRequest], warmup: list[BenchRequest], result: DriveResult
    ) -> dict[str, Any]:
        records = result.records
        done = (record for record in records if record.outcome == "done")
        return {
            "load": str(load),
            "load_label": load.label,
            "seed": seed,
            "warmup_requests": len(warmup),
            "warmup_failures": result.warmup_failures,
            "client_busy": [round(busy, 3) for busy in result.busy],
            "short_outputs": sum(record.num_output_tokens < requests[record.index].output_len for record in done),
            "metrics": measure(records, self.slo),
            "requests": request_rows(records),
        }

    def _against_offline(self, follow: Follow) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
        """Rounds of server, offline, server, offline. Each round has requests of its own."""
        load, threads = self.loads[0], self.threads
        assert load.concurrency is not None and threads is not None
        runs, offline, server = [], [], {}
        for number in range(self.args.rounds or 3):
            requests, warmup = self._workload(load, self._seed(number))
            with self._server() as target:
                server = self._describe(target)
                runs.append(self._run_load(target, server, load, self._seed(number), follow))
            check_all_done(runs[-1]["metrics"], requests)
            offline.append(run_in_child(offline_spec(self.engine, load.concurrency, threads, requests, warmup)))
        metrics = [run["metrics"] for run in runs]
        return runs, server, compare(metrics, offline, load.concurrency, threads)

    def _report(
        self, runs: list[dict[str, Any]], server: dict[str, Any], comparison: dict[str, Any] | None
    ) -> dict[str, Any]:
        args = self.args
        names = ("requests", "processes", "timeout", "temperature", "top_p", "ignore_eos", "rounds")
        settings = {name: getattr(args, name) for name in names}
        settings |= {"input_len": str(self.input_len), "output_len": str(self.output_len)}
        return report_head("serve") | {
            "server": server,
            "settings": settings | {"vocab_size": self.vocab_size, "threads": self.threads, "slo_ms": self.slo},
            "versions": _versions(is_local=args.launch is not None or self.target.is_local),
            "runs": runs,
            "comparison": comparison,
        }


@contextlib.contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the server and the client processes are ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _versions(is_local: bool) -> dict[str, Any]:
    """Versions on this machine, with the client's packages. A local server runs on it too."""
    found: dict[str, Any] = dict(versions("cuda" if is_local and torch.cuda.is_available() else "cpu"))
    for package in ("aiohttp", "uvloop"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"cores": available_cores(), "server_on_this_machine": is_local}
