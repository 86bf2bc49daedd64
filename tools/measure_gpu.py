"""Measures PageBrain and Hugging Face on a GPU: the table of docs/performance, in one command.

    python -m tools.measure_gpu --json docs/performance/gpu.json

GPT-2 124M with random weights in bfloat16, token ids in and out, end of sequence ignored. The cases, and what others reached
on them, stand in :mod:`tools.gpu_table`. Every case of PageBrain runs three times on one engine; the time from the start of
the process until the engine could take its first request is that of starts of their own. Hugging Face runs the largest
workload, each time in a process of its own.

Where one invocation may not take long, name the parts: ``--only pagebrain`` takes a minute or two, ``--only hf`` about six.
What the JSON holds of other parts stays in it, and it is written after every run.
"""

import argparse
import datetime
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagebrain.bench.child import RunSpec, child_events, run_in_child
from pagebrain.bench.machine_facts import versions
from pagebrain.bench.offline import candidates
from pagebrain.bench.offline_report import summarize
from pagebrain.bench.workload import BenchRequest, LengthRange, make_warmup, make_workload, model_limits
from pagebrain.config import PageBrainConfig
from pagebrain.errors import ConfigError, PageBrainError
from pagebrain.machine import available_cores
from tools.engine_session import Case, SessionSpec, run_row
from tools.gpu_table import CASES, HF_WORKLOAD, SAMPLINGS, VLLM, WORKLOADS, Workload, case_name, print_tables

PARTS = ("starts", "pagebrain", "hf")
HF_ENGINES = ("hf-static", "hf-continuous")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts that were named, print the table; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="read if it exists, and written")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each case of PageBrain (default: 3)")
    parser.add_argument("--hf-runs", type=int, default=3, metavar="N", help="of each Hugging Face engine (default: 3)")
    parser.add_argument("--model", default="openai-community/gpt2", metavar="NAME", help="of random weights")
    parser.add_argument("--dtype", default="bfloat16", metavar="NAME", help="(default: bfloat16)")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="(default: cuda)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each core)")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide counts and lengths by N, to try this out")
    try:
        return Measurement(parser.parse_args(argv)).run()
    except PageBrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class Measurement:
    """One invocation: which parts, of which model, and the report that they go into."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.parts = [part for part in PARTS if part in args.only.split(",")]
        unknown = sorted(set(args.only.split(",")) - set(PARTS))
        if unknown:
            raise ConfigError(f"--only knows {', '.join(PARTS)}; got {', '.join(unknown)}")
        for name in ("runs", "hf_runs", "shrink"):
            if getattr(args, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        if not args.json.absolute().parent.is_dir():
            raise ConfigError(f"--json {args.json} cannot be written: name a file in a folder that exists")
        config = PageBrainConfig(model=args.model, load_format="dummy", dtype=args.dtype, device=args.device, seed=0)
        config = config.with_device_and_dtype()
        self.model = {name: getattr(config, name) for name in ("model", "load_format", "dtype", "device", "seed")}
        self.vocab_size, _ = model_limits(config)
        self.threads: int = args.threads or available_cores()
        self.began = time.monotonic()
        self.failures: list[str] = []
        self.report: dict[str, Any] = {"benchmark": "gpu", "parts": {}, "recorded_elsewhere": VLLM}
        if args.json.exists():
            self.report["parts"] = json.loads(args.json.read_text(encoding="utf-8")).get("parts", {})

    def run(self) -> int:
        """Measure part after part. After a failure the next part runs all the same."""
        from rich.console import Console

        for part in self.parts:
            measure = {"starts": self._starts, "pagebrain": self._pagebrain, "hf": self._hf}[part]
            try:
                measure(self._begin(part))
            except PageBrainError as error:
                self._fail(part, str(error))
            self._write()
        print_tables(self.report, Console(width=150))
        for failure in self.failures:
            print(f"failed: {failure}", file=sys.stderr)
        return int(bool(self.failures))

    # PageBrain --------------------------------------------------------------------------------------------------------

    def _starts(self, part: dict[str, Any]) -> None:
        """The first start finds no compiled kernel on the disk, those after it do.

        All find the bytecode of the packages, as pip leaves it: compiling what torch and transformers import takes as long
        as all the rest, and an image that was made without bytecode would do that at every start.
        """
        environment = {"PYTHONDONTWRITEBYTECODE": ""}
        warmup_free = Case("first request", self.requests(WORKLOADS["1 request"]), [], runs=1)
        spec = SessionSpec(self.model, self.threads, [warmup_free])
        part["starts"] = []
        with tempfile.TemporaryDirectory() as cache:
            for number in range(self.args.runs + 1):
                start: dict[str, Any] = {"compiled_before": number > 0}
                for event in self._events(spec, f"start {number}", environment | {"TRITON_CACHE_DIR": cache}):
                    start |= event.get("ready", {})
                    if "run" in event:
                        start["first_request_s"] = event["run"]["elapsed_s"]
                    if "failed" in event:
                        self._fail(f"start {number}", event["failed"])
                part["starts"].append(start)
                self._say(f"start {number}: ready after {start.get('ready_s', float('nan')):.1f} s")
                self._write()

    def _pagebrain(self, part: dict[str, Any]) -> None:
        """All cases on one engine; the first of them meets it cold."""
        specs = [self._case(*names) for names in CASES]
        part["cases"] = {
            spec.name: self.describe(WORKLOADS[workload])
            | {"workload": workload, "sampling": sampling, "request_rate": spec.request_rate}
            | vars(spec.sampling)
            for spec, (workload, sampling, _) in zip(specs, CASES)
        }
        runs: dict[str, list[dict[str, Any]]] = {spec.name: [] for spec in specs}
        for event in self._events(SessionSpec(self.model, self.threads, specs), "PageBrain", {}):
            if "ready" in event:
                part |= {"configuration": event["configuration"], "detokenization": event["detokenization"]}
                self._say(f"ready after {event['ready']['ready_s']:.1f} s")
                continue
            name = event["case"]
            case = part["cases"][name]
            if "failed" in event:
                case["failed"] = event["failed"]
                self._fail(name, event["failed"])
            elif "closer" in event:
                case["closer"] = event["closer"]
            elif name == specs[0].name and "first_run" not in case:
                case["first_run"] = event["run"]
                self._say(f"{name}: {event['run']['output_tokens_per_s']:,.0f} tokens/s, the very first run")
            else:
                runs[name].append(event["run"])
                case |= summarize_runs(runs[name])
                self._say(f"{name}: {event['run']['output_tokens_per_s']:,.0f} tokens/s")
            self._write()

    def _case(self, workload: str, sampling: str, request_rate: float | None) -> Case:
        """What the child runs for one case; the first is not warmed up, and its first run is one more."""
        requests = self.requests(WORKLOADS[workload])
        is_first = (workload, sampling, request_rate) == CASES[0]
        return Case(
            name=case_name(workload, sampling, request_rate),
            requests=requests,
            warmup=[] if is_first else make_warmup(requests, self.vocab_size, 0),
            sampling=SAMPLINGS[sampling],
            runs=self.args.runs + is_first,
            request_rate=request_rate,
            look_closer=True,
        )

    def _events(self, spec: SessionSpec, what: str, environment: dict[str, str]) -> Any:
        return child_events("tools.engine_session", spec.to_json(), self.threads, what, environment)

    # Hugging Face -----------------------------------------------------------------------------------------------------

    def _hf(self, part: dict[str, Any]) -> None:
        """Each engine in turn, each run in a process of its own."""
        requests = self.requests(WORKLOADS[HF_WORKLOAD])
        warmup = make_warmup(requests, self.vocab_size, 0)
        part["engines"] = {}
        runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in HF_ENGINES}
        for _ in range(self.args.hf_runs):
            for engine in HF_ENGINES:
                settings = candidates(engine, requests, self.model["device"], None)[0]
                found = part["engines"].setdefault(engine, self.describe(WORKLOADS[HF_WORKLOAD]))
                try:
                    result = run_in_child(RunSpec(engine, self.model, self.threads, requests, warmup, settings))
                except PageBrainError as error:
                    found["failed"] = str(error)
                    self._fail(engine, str(error))
                    continue
                runs[engine].append(run_row(requests, result))
                found |= {"workload": HF_WORKLOAD, "sampling": "greedy", "configuration": result.configuration}
                found |= summarize_runs(runs[engine])
                self._say(f"{engine}: {runs[engine][-1]['output_tokens_per_s']:,.0f} tokens/s")
                self._write()

    # The workload and the report --------------------------------------------------------------------------------------

    def lengths(self, workload: Workload) -> tuple[int, LengthRange, LengthRange]:
        """Requests, and the tokens of their prompts and outputs."""
        shrink = self.args.shrink
        input_len, output_len = (
            LengthRange(*(max(2, number // shrink) for number in numbers))
            for numbers in (workload.input_len, workload.output_len)
        )
        return max(1, workload.requests // shrink), input_len, output_len

    def requests(self, workload: Workload) -> list[BenchRequest]:
        """The same ones whenever they are asked for."""
        return make_workload(*self.lengths(workload), self.vocab_size, seed=0)

    def describe(self, workload: Workload) -> dict[str, Any]:
        """The workload in numbers."""
        requests = self.requests(workload)
        count, input_len, output_len = self.lengths(workload)
        return {
            "requests": count,
            "input_len": str(input_len),
            "output_len": str(output_len),
            "input_tokens": sum(len(request.prompt_token_ids) for request in requests),
            "output_tokens": sum(request.output_len for request in requests),
        }

    def _begin(self, name: str) -> dict[str, Any]:
        """A part without results, in place of what the report had of it."""
        part: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "tools.measure_gpu", *sys.argv[1:]]),
            "versions": versions(self.model["device"]),
            "model": self.model,
            "threads": self.threads,
        }
        self.report["parts"][name] = part
        return part

    def _fail(self, what: str, why: str) -> None:
        self.failures.append(f"{what}: {why}")
        self._say(f"{what} failed: {why}")

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        self.args.json.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")


def summarize_runs(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ends over the runs, and whether all gave the same tokens."""
    report: dict[str, Any] = {
        "output_tokens_per_s": summarize([run["output_tokens_per_s"] for run in runs]),
        "first_token_s": summarize([run["first_token_s"]["median"] for run in runs]),
        "same_tokens_in_all_runs": len({run["tokens"] for run in runs}) == 1,
    }
    totals = [run["totals"] for run in runs if run["totals"]]
    if totals:
        shares = [each["num_graph_decode_tokens"] / max(1, each["num_decode_tokens"]) for each in totals]
        report |= {"graph_decode_share": summarize(shares), "totals": totals}
    return report


if __name__ == "__main__":
    sys.exit(main())
