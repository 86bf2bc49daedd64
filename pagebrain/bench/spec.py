"""What goes into a child process that runs one engine, and what comes out of it."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pagebrain.bench.sampled import GREEDY, Sampling
from pagebrain.bench.workload import BenchRequest


@dataclass(frozen=True)
class RunSpec:
    """What one child process does: ``model`` are fields of ``PageBrainConfig``, ``settings`` the engine's own.

    ``sampling`` and ``request_rate`` (requests a second; ``None`` is all at once) are for PageBrain alone. With
    ``look_closer`` it runs the requests again after the timed run, to see where the time of a step went.
    """

    engine: str
    model: dict[str, Any]
    threads: int
    requests: list[BenchRequest]
    warmup: list[BenchRequest]
    settings: dict[str, Any] = field(default_factory=dict)
    sampling: Sampling = GREEDY
    request_rate: float | None = None
    look_closer: bool = False

    def to_json(self) -> str:
        """The spec for the child's standard input."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RunSpec":
        """The spec as :meth:`to_json` wrote it."""
        raw = json.loads(text)
        for name in ("requests", "warmup"):
            raw[name] = [BenchRequest(tuple(item["prompt_token_ids"]), item["output_len"]) for item in raw[name]]
        return cls(**raw | {"sampling": Sampling(**raw["sampling"])})


Mark = Callable[[str], None]
"""Called with ``ready`` when an engine could take its first request, and with ``warm`` when it has warmed up."""


def no_mark(name: str) -> None:
    """For whoever does not ask when an engine was ready."""


@dataclass(frozen=True)
class RunResult:
    """What one timed run gave, per request in the order of the requests; times in seconds, sizes in bytes.

    ``configuration`` is what the engine ran with, ``detokenization`` whether text was made of the tokens. ``start`` has
    ``imported_s`` and ``ready_s``, seconds since the child was spawned, and ``warmup_s`` after that, in which kernels show
    that are compiled late. PageBrain adds ``totals``, those of :class:`~pagebrain.bench.totals.Totals` over the timed run,
    and, where it was asked for, ``closer``: what :mod:`~pagebrain.bench.closer` saw.
    """

    elapsed_s: float
    first_token_s: list[float]
    token_ids: list[list[int]]
    configuration: dict[str, Any]
    detokenization: str
    peak_rss_bytes: int = 0
    peak_cuda_bytes: int | None = None
    start: dict[str, float] | None = None
    totals: dict[str, float] | None = None
    closer: dict[str, Any] | None = None


def synchronize(device: str) -> None:
    """Wait until everything that was asked of a GPU is done, so that a clock may be read."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
