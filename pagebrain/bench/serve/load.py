"""The options and the load of ``pagebrain bench serve``: clients or requests a second, and arrival times."""

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pagebrain.bench.command import check_at_least_1, check_files, require
from pagebrain.errors import ConfigError

T = TypeVar("T")

ARRIVAL_SEED_OFFSET = 2_000_003
"""Added to the seed for the arrivals, so that they are independent of the prompts."""


@dataclass(frozen=True)
class Load:
    """A closed loop of ``concurrency`` clients, or an open loop at ``rate`` requests a second; exactly one is set.

    In a closed loop each client sends its next request when its last has ended, so a slow server gets fewer requests a
    second. In an open loop requests do not wait for others, like those of independent users: a Poisson process. A rate of
    infinity sends all at once.
    """

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ConfigError("a load has either a concurrency or a request rate")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"the concurrency must be at least 1, got {self.concurrency}")
        if self.rate is not None and not self.rate > 0:
            raise ConfigError(f"the request rate must be greater than 0 (or inf), got {self.rate}")

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} client{'s' * (self.concurrency > 1)}"
        return "all at once" if self.rate == math.inf else f"{self.rate:g} requests/s"

    @property
    def label(self) -> str:
        """A short text for charts."""
        if self.rate is None:
            return str(self.concurrency)
        return "all" if self.rate == math.inf else f"{self.rate:g}/s"

    def arrivals_s(self, num_requests: int, seed: int) -> dict[int, float] | None:
        """Request -> seconds from the start at which it is sent, ascending; ``None`` for a closed loop.

        The same arguments give the same times.
        """
        if self.rate is None:
            return None
        if self.rate == math.inf:
            return dict.fromkeys(range(num_requests), 0.0)
        rng = random.Random(seed + ARRIVAL_SEED_OFFSET)
        now_s, arrivals = 0.0, {}
        for index in range(num_requests):
            arrivals[index] = now_s  # the first at 0: a gap before it would only make the run longer
            now_s += rng.expovariate(self.rate)
        return arrivals


@dataclass(frozen=True)
class ClientJob:
    """The work of the clients of one process; before :meth:`split`, of a whole run.

    Attributes:
        url: of the completions endpoint.
        headers: of every request.
        bodies: of all requests of the run, as JSON.
        warmup: bodies that are sent first and not timed, as many at once as there are clients.
        num_clients: of a closed loop, and during the warm-up.
        arrivals_s: of an open loop: request -> seconds after the start, ascending; ``None`` in a closed loop.
        timeout_s: a request that takes longer has failed.
    """

    url: str
    headers: dict[str, str]
    bodies: list[bytes]
    warmup: list[bytes]
    num_clients: int
    arrivals_s: dict[int, float] | None
    timeout_s: float

    def split(self, num_processes: int) -> "list[ClientJob]":
        """At most ``num_processes`` jobs, none of them empty. Clients, arrivals and warm-up are assigned in turn."""
        num_jobs = min(num_processes, self.num_clients if self.arrivals_s is None else len(self.arrivals_s))
        shares = [slice(number, None, num_jobs) for number in range(num_jobs)]
        return [
            replace(
                self,
                warmup=self.warmup[share],
                num_clients=max(1, len(range(self.num_clients)[share])),
                arrivals_s=None if self.arrivals_s is None else dict(list(self.arrivals_s.items())[share]),
            )
            for share in shares
        ]


def parse_loads(concurrency: int | None, rate: float | None, sweep_concurrency: str | None, sweep: str | None) -> list[Load]:
    """The loads of the options, one or several. Raises ``ConfigError``."""
    if sweep is not None:
        return [Load(rate=_number("--sweep", item, float)) for item in sweep.split(",")]
    if sweep_concurrency is not None:
        return [Load(concurrency=_number("--sweep-concurrency", item, int)) for item in sweep_concurrency.split(",")]
    return [Load(rate=rate) if rate is not None else Load(concurrency=concurrency)]


def _number(option: str, text: str, kind: Callable[[str], T]) -> T:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{option} must be a list such as 1,2,4,8; got {text!r} in it") from None


DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_CONCURRENCY = 16


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pagebrain bench serve``."""
    group = parser.add_argument_group("server")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--url", default=DEFAULT_URL, metavar="URL", help=f"its root (default: {DEFAULT_URL})")
    where.add_argument(
        "--launch",
        metavar="ARGS",
        help="start pagebrain serve ARGS for the run and stop it after: --launch='--async-scheduling'",
    )
    group.add_argument("--api-key", metavar="KEY", help="default: what PAGEBRAIN_API_KEY holds, if it is set")
    group.add_argument("--model", metavar="NAME", help="what the server calls it (default: the first it lists)")
    group.add_argument("--threads", type=int, metavar="N", help="with --launch: CPU threads of the engine")

    group = parser.add_argument_group("load")
    load = group.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        type=int,
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help=f"clients, each sends its next request when its last ended (default: {DEFAULT_CONCURRENCY})",
    )
    load.add_argument("--request-rate", type=float, metavar="R", help="requests/s, Poisson arrivals; inf: all at once")
    load.add_argument("--sweep-concurrency", metavar="N,N,...", help="one run for each number of clients")
    load.add_argument("--sweep", metavar="R,R,...", help="one run for each request rate")
    group.add_argument("--requests", type=int, default=64, metavar="N", help="how many, in each run (default: 64)")
    group.add_argument("--warmup", type=int, metavar="N", help="requests sent first, not counted (default: one a client)")
    group.add_argument("--processes", type=int, default=1, metavar="P", help="processes for the clients (default: 1)")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a request may take (default: 600)")

    group = parser.add_argument_group("requests")
    group.add_argument("--input-len", default="32:128", metavar="LOW:HIGH", help="tokens of a prompt (default: 32:128)")
    group.add_argument("--output-len", default="32:128", metavar="LOW:HIGH", help="tokens to generate (default: 32:128)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts, lengths and arrivals (default: 0)")
    group.add_argument("--vocab-size", type=int, metavar="N", help="prompts are random ids below it (default: the model's)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the best token (default: 0)")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the best tokens that add up to P")
    group.add_argument(
        "--no-ignore-eos",
        action="store_false",
        dest="ignore_eos",
        help="do not send ignore_eos, for a server that does not know it; outputs may then be shorter",
    )

    group = parser.add_argument_group("results")
    group.add_argument("--slo", default="", metavar="NAME:MS,...", help="goodput within limits: ttft:200,tpot:20,e2e:5000")
    group.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    group.add_argument("--chart", type=Path, metavar="FILE", help="of a sweep: latency against throughput, .png or .svg")
    group.add_argument(
        "--against-offline", action="store_true", help="with --launch: also run the requests through LLM.generate"
    )
    group.add_argument("--rounds", type=int, metavar="N", help="with --against-offline: interleaved rounds (default: 3)")


def check_options(args: argparse.Namespace, num_loads: int) -> None:
    """Raise ``ConfigError`` for numbers out of range, options that exclude each other, files that cannot be written."""
    _check_numbers(args)
    check_files(args)
    if args.chart is not None and num_loads < 2:
        raise ConfigError("--chart draws a sweep: give several loads with --sweep or --sweep-concurrency")
    if args.threads is not None and args.launch is None:
        raise ConfigError("--threads is for --launch: a server that runs already has its threads")
    if args.against_offline:
        _check_against_offline(args, num_loads)
    elif args.rounds is not None:
        raise ConfigError("--rounds is for --against-offline")
    require("aiohttp", "bench serve")
    if args.chart is not None:
        require("matplotlib", "bench serve")


def _check_numbers(args: argparse.Namespace) -> None:
    check_at_least_1(args, "requests", "processes", "threads", "rounds", "vocab_size")
    if args.warmup is not None and args.warmup < 0:
        raise ConfigError(f"--warmup must be at least 0, got {args.warmup}")
    if not 0 < args.timeout < float("inf"):
        raise ConfigError(f"--timeout must be seconds greater than 0, got {args.timeout}")
    if not 0 <= args.temperature < float("inf"):
        raise ConfigError(f"--temperature must be at least 0 and finite, got {args.temperature}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p must be greater than 0 and at most 1, got {args.top_p}")


def _check_against_offline(args: argparse.Namespace, num_loads: int) -> None:
    if args.launch is None:
        raise ConfigError("--against-offline needs --launch: both sides must have the same model and engine settings")
    if num_loads > 1 or args.sweep or args.sweep_concurrency or args.request_rate is not None:
        raise ConfigError("--against-offline compares a closed loop: use it with --concurrency")
    if args.temperature != 0 or args.top_p is not None or not args.ignore_eos:
        raise ConfigError("--against-offline is greedy, to the length asked for: no --temperature, --top-p, --no-ignore-eos")
