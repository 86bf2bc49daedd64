"""How the benchmark's requests choose their tokens: greedily, or sampled with seeds that make a run repeatable."""

from collections.abc import Sequence
from dataclasses import dataclass

from pagebrain.bench.workload import BenchRequest
from pagebrain.sampling_params import SamplingParams


@dataclass(frozen=True)
class Sampling:
    """What ``--temperature``, ``--top-p`` and ``--top-k`` say, as vLLM spells them; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    def __str__(self) -> str:
        if self.greedy:
            return "greedy: the most probable token; the end-of-sequence token ignored"
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"top-p {self.top_p:g}"] * (self.top_p < 1.0) + [f"top-k {self.top_k}"] * (self.top_k > 0)
        return f"{', '.join(parts)}; a request's seed is its number; the end-of-sequence token ignored"

    def params(self, requests: Sequence[BenchRequest]) -> list[SamplingParams]:
        """Parameters for each request. Raises ``InvalidRequestError`` for numbers that there cannot be."""
        return [
            SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                seed=None if self.greedy else index,
                max_tokens=request.output_len,
                ignore_eos=True,
            )
            for index, request in enumerate(requests)
        ]


GREEDY = Sampling()
"""The most probable token, always."""
