"""The requests of a benchmark: random prompts with lengths drawn from ranges, the same for every engine.

A workload is a pure function of its arguments, so that two runs or two machines time the same work. Token ids are random, so
prompts share no prefix, and the end-of-sequence token is ignored. Tokens are chosen greedily, or sampled with fixed seeds.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pagebrain.errors import ConfigError
from pagebrain.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pagebrain.config import PageBrainConfig

WARMUP_SEED_OFFSET = 1_000_003
"""Added to the seed for the warm-up, so that its prompts differ and no prefix cache can hold the timed ones."""

WARMUP_OUTPUT_LEN = 4
"""Most output tokens of a warm-up request."""


class LengthRange(NamedTuple):
    """Numbers of tokens from ``low`` to ``high``, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, name: str, text: str) -> "LengthRange":
        """``"32:128"``, or ``"64"`` for one length. Raises ``ConfigError`` with the argument's name."""
        low, colon, high = text.partition(":")
        try:
            numbers = cls(int(low), int(high if colon else low))
        except ValueError:
            raise ConfigError(f"{name} must be LOW:HIGH or one number, such as 32:128; got {text!r}") from None
        if numbers.low < 1 or numbers.low > numbers.high:
            raise ConfigError(f"{name} must be LOW:HIGH with 1 <= LOW <= HIGH, got {text!r}")
        return numbers

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


@dataclass(frozen=True)
class BenchRequest:
    """One request: a prompt, and the exact number of tokens to generate."""

    prompt_token_ids: tuple[int, ...]
    output_len: int

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_token_ids) + self.output_len


def make_workload(
    num_requests: int, input_len: LengthRange, output_len: LengthRange, vocab_size: int, seed: int
) -> list[BenchRequest]:
    """Requests with uniformly drawn lengths and token ids. The same arguments give the same requests."""
    rng = random.Random(seed)
    requests = []
    for _ in range(num_requests):
        num_input, num_output = rng.randint(*input_len), rng.randint(*output_len)
        requests.append(BenchRequest(tuple(rng.randrange(vocab_size) for _ in range(num_input)), num_output))
    return requests


def make_warmup(requests: Sequence[BenchRequest], vocab_size: int, seed: int) -> list[BenchRequest]:
    """Requests with prompts as long as those of ``requests``, other tokens, and at most ``WARMUP_OUTPUT_LEN`` outputs."""
    rng = random.Random(seed + WARMUP_SEED_OFFSET)
    warmup = []
    for request in requests:
        prompt = tuple(rng.randrange(vocab_size) for _ in request.prompt_token_ids)
        warmup.append(BenchRequest(prompt, min(request.output_len, WARMUP_OUTPUT_LEN)))
    return warmup


def check_lengths(input_len: LengthRange, output_len: LengthRange, num_positions: int) -> None:
    """Raise ``ConfigError`` if the longest prompt with the longest output does not fit the model's positions."""
    longest = input_len.high + output_len.high
    if longest > num_positions:
        raise ConfigError(
            f"the longest request has {input_len.high} + {output_len.high} = {longest} tokens, but the model has "
            f"{num_positions} positions: lower --input-len or --output-len"
        )


def model_limits(config: "PageBrainConfig") -> tuple[int, int]:
    """``(vocab_size, num_positions)`` of the model that ``config`` names, without reading its weights.

    Raises ``ModelLoadError`` if there is no such model or it is not a GPT-2.
    """
    from pagebrain.models.loading import read_config

    hf_config = read_config(config)
    return int(hf_config.vocab_size), int(hf_config.n_positions)


@dataclass(frozen=True)
class Sampling:
    """The values of ``--temperature``, ``--top-p`` and ``--top-k``; temperature 0 is greedy."""

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
        """Parameters for each request. Raises ``InvalidRequestError`` for values out of range."""
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
