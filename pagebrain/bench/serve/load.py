"""The load of a benchmark run: how many clients, or how many requests a second, when each is sent, and by which process."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from pagebrain.errors import ConfigError

T = TypeVar("T")

ARRIVAL_SEED_OFFSET = 2_000_003
"""Added to the seed for the arrivals, so that they do not follow the draws that made the prompts."""


@dataclass(frozen=True)
class Load:
    """A closed loop of ``concurrency`` clients, or an open loop at ``rate`` requests a second; exactly one is set.

    In a closed loop each client sends its next request when its last has ended, so a slow server is asked less. In an open
    loop requests come whether or not others have ended, as independent users send them: a Poisson process. A rate of
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
        """As short as a chart needs it."""
        if self.rate is None:
            return str(self.concurrency)
        return "all" if self.rate == math.inf else f"{self.rate:g}/s"

    def arrivals_s(self, num_requests: int, seed: int) -> dict[int, float] | None:
        """When each request is to be sent: request -> seconds from the start, ascending. ``None`` for a closed loop.

        The same arguments give the same times.
        """
        if self.rate is None:
            return None
        if self.rate == math.inf:
            return dict.fromkeys(range(num_requests), 0.0)
        rng = random.Random(seed + ARRIVAL_SEED_OFFSET)
        now_s, arrivals = 0.0, {}
        for index in range(num_requests):
            arrivals[index] = now_s  # the first at once: the gap before it would only make the run longer
            now_s += rng.expovariate(self.rate)
        return arrivals


@dataclass(frozen=True)
class ClientJob:
    """What the clients of one process do; those of a whole run before it is split.

    Attributes:
        url: of the completions endpoint.
        headers: of every request.
        bodies: of all requests of the run, as JSON.
        warmup: bodies that are sent first, not timed, as many at once as there are clients.
        num_clients: of a closed loop, and during the warm-up.
        arrivals_s: of an open loop: request -> seconds after the start, in order; ``None`` in a closed loop.
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
        """At most ``num_processes`` jobs with something to do: clients, arrivals and the warm-up are dealt out in turn."""
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
    """The loads that the options ask for, one or several. Raises ``ConfigError``."""
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
