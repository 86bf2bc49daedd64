"""What goes into a child process that runs one engine, and what comes out of it."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from pagebrain.bench.workload import BenchRequest


@dataclass(frozen=True)
class RunSpec:
    """What one child process does: ``model`` are fields of ``PageBrainConfig``, ``settings`` the engine's own."""

    engine: str
    model: dict[str, Any]
    threads: int
    requests: list[BenchRequest]
    warmup: list[BenchRequest]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The spec for the child's standard input."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RunSpec":
        """The spec as :meth:`to_json` wrote it."""
        raw = json.loads(text)
        for name in ("requests", "warmup"):
            raw[name] = [BenchRequest(tuple(item["prompt_token_ids"]), item["output_len"]) for item in raw[name]]
        return cls(**raw)


@dataclass(frozen=True)
class RunResult:
    """What one timed run gave, per request in the order of the requests; times in seconds, sizes in bytes.

    ``configuration`` is what the engine ran with, ``detokenization`` whether text was made of the tokens.
    """

    elapsed_s: float
    first_token_s: list[float]
    token_ids: list[list[int]]
    configuration: dict[str, Any]
    detokenization: str
    peak_rss_bytes: int = 0
    peak_cuda_bytes: int | None = None


def synchronize(device: str) -> None:
    """Wait until everything that was asked of a GPU is done, so that a clock may be read."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
