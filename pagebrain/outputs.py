"""The engine's outputs: a delta for each step of a sample, and the whole output of a request when it has ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]
"""``stop``: end of sequence, stop token or string; ``length``: ``max_tokens`` or the last position; ``abort``: cancelled."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the model's own distribution (before temperature, penalties and truncation).

    ``top`` holds the ``logprobs`` most probable ``(token_id, logprob)`` pairs, best first; ``rank`` of the chosen token
    counts from 1.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class CompletionOutput:
    """One sample of a request, so far. ``stop_reason`` is the stop string or stop token id that ended it, if any.

    ``score`` is that of an output of beam search, see :class:`~pagebrain.sampling_params.BeamSearchParams`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    score: float | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """Times of one request in seconds of ``time.monotonic``; ``None`` where it has not happened yet.

    ``num_cached_tokens``: prompt tokens of the first sample that were in the prefix cache when it started.
    """

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request with all its samples. ``prompt`` is ``None`` if token ids were given.

    ``prompt_logprobs[i]`` belongs to prompt token ``i``; the first is ``None``, because no token precedes it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def num_cached_tokens(self) -> int | None:
        """See :class:`RequestMetrics`."""
        return self.metrics.num_cached_tokens


class OutputDelta(NamedTuple):
    """What one step added to one sample of one request. It is a named tuple because one is made for every token.

    ``text`` may be empty while a character is incomplete or a stop string may be beginning. ``prompt_logprobs`` come with
    the first delta of sample 0, if they were asked for. With the last delta of a request's last sample come its ``metrics``
    and ``finished``, the whole request. Between processes ``finished`` is left out, and log-probabilities are packed.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # instead of a tuple's method of that name
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    finished: RequestOutput | None = None


@dataclass(frozen=True)
class BeamSearchSequence:
    """One output of beam search.

    Attributes:
        tokens: prompt and output.
        text: of the output.
        cum_logprob: sum of the log-probabilities of the output's tokens.
        score: that sum with the length penalty, see :class:`~pagebrain.sampling_params.BeamSearchParams`.
        finish_reason: ``stop`` at an end-of-sequence token, else ``length``.
    """

    tokens: tuple[int, ...]
    text: str
    cum_logprob: float
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class BeamSearchOutput:
    """The outputs of beam search for one prompt, best first."""

    sequences: tuple[BeamSearchSequence, ...]
