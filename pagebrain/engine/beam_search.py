"""Beam search: which beams of a prompt go on, and which outputs have ended.

Each beam is a :class:`~pagebrain.engine.sequence.Sequence` that computes one step. The step returns its most probable next
tokens. :class:`BeamSearch` collects these candidates, and when it has those of all beams, it chooses the beams that go on.
They are new sequences. The engine makes them forks of the old ones, so that beams share the blocks of the tokens that they
share. Everything here is arithmetic on the host.

The rules are those of Hugging Face's ``generate(num_beams=...)``, so that tokens and scores are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pagebrain.cache import CacheManager
from pagebrain.engine.sequence import Sequence, SequenceStatus
from pagebrain.outputs import FinishReason, TokenLogprobs
from pagebrain.sampling_params import BeamSearchParams


class Continuation(NamedTuple):
    """A beam that goes on: ``beam`` with ``token_id`` behind it. ``logprob`` is the sum over all generated tokens."""

    beam: Sequence
    token_id: int
    logprob: float


@dataclass(frozen=True)
class EndedBeam:
    """An output that has ended. ``logprob`` is the sum over its tokens, ``score`` that sum with the length penalty."""

    token_ids: tuple[int, ...]
    logprob: float
    score: float
    finish_reason: FinishReason


def num_candidates(params: BeamSearchParams, num_eos_tokens: int) -> int:
    """Most probable tokens of each beam that a search looks at.

    Every beam may be ended by each of the end-of-sequence tokens, and ``beam_width`` others must remain.
    """
    return params.beam_width * max(2, 1 + (0 if params.ignore_eos else num_eos_tokens))


class BeamSearch:
    """The search for one prompt.

    Args:
        params: of the request.
        first: the prompt, as the only beam.
        max_num_tokens: limit of prompt and output together.
        eos_token_ids: tokens that end an output; not read if ``params.ignore_eos``.

    Attributes:
        beams: the beams of the next step with their log-probabilities, best first.
        ended: outputs that have ended, best first, at most ``beam_width``.
        num_preemptions: of beams whose step has been read.
        num_cached_tokens: prompt tokens that were in the prefix cache when the search began.
    """

    def __init__(
        self, params: BeamSearchParams, first: Sequence, max_num_tokens: int, eos_token_ids: frozenset[int]
    ) -> None:
        self.params = params
        self.max_num_tokens = max_num_tokens
        self.num_prompt_tokens = first.num_prompt_tokens
        self.eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self.ended: list[EndedBeam] = []
        self.num_preemptions = 0
        self.num_cached_tokens: int | None = None
        self._num_candidates = num_candidates(params, len(eos_token_ids))
        self.beams: dict[Sequence, float] = {first: 0.0}
        self._candidates: dict[Sequence, tuple[tuple[int, float], ...]] = {}

    def note(self, beam: Sequence, scores: TokenLogprobs) -> None:
        """Take the candidates of a beam whose step was read."""
        self._candidates[beam] = scores.top

    @property
    def is_complete(self) -> bool:
        """Whether the candidates of all beams are there."""
        return len(self._candidates) == len(self.beams)

    @property
    def noted(self) -> list[Sequence]:
        """The beams whose candidates are there."""
        return [*self._candidates]

    def choose(self) -> list[Continuation]:
        """The beams that go on, best first; none if the search has ended."""
        width, beams = self.params.beam_width, list(self.beams)
        candidates = sorted(
            (-(self.beams[beam] + logprob), index, token_id)
            for index, beam in enumerate(beams)
            for token_id, logprob in self._candidates[beam]
        )
        if self.num_cached_tokens is None:
            self.num_cached_tokens = beams[0].num_cached_tokens
        num_output = len(beams[0].token_ids) + 1 - self.num_prompt_tokens
        is_last = self.num_prompt_tokens + num_output >= self.max_num_tokens
        going_on: list[Continuation] = []
        for rank, (negative, index, token_id) in enumerate(candidates[: self._num_candidates]):
            is_eos = token_id in self.eos_token_ids
            if not is_eos and not is_last:
                going_on.append(Continuation(beams[index], token_id, -negative))
            elif rank < width:  # an end further down the list would push out a better beam
                token_ids = (*beams[index].output_token_ids, token_id)
                score = -negative / num_output**self.params.length_penalty
                self.ended.append(EndedBeam(token_ids, -negative, score, "stop" if is_eos else "length"))
        self.ended.sort(key=lambda ended: -ended.score)
        del self.ended[width:]
        self.num_preemptions += sum(beam.num_preemptions for beam in beams)
        self._candidates = {}
        if is_last or self._has_ended(going_on[0].logprob, num_output):
            return []
        return going_on[:width]

    def _has_ended(self, best_logprob: float, num_output: int) -> bool:
        """Whether the search needs no further step. ``best_logprob`` is that of the best beam that could go on."""
        params = self.params
        if len(self.ended) < params.beam_width:
            return False
        if params.early_stopping is True:
            return True
        longest = self.max_num_tokens - self.num_prompt_tokens
        length = longest if params.early_stopping == "never" and params.length_penalty > 0 else num_output
        best_score: float = best_logprob / length**params.length_penalty
        return best_score <= self.ended[-1].score


class BeamScheduler(Protocol):
    """What a scheduler that declares ``beam_search`` has besides; see :class:`pagebrain.engine.scheduler.Scheduler`."""

    def num_seats(self, ended: list[Sequence]) -> int: ...
    def continue_with(self, ended: list[Sequence], forks: list[Sequence], waiting: list[Sequence]) -> None: ...


def continue_beams(
    continuations: list[Continuation],
    ended: list[Sequence],
    cache_manager: CacheManager,
    scheduler: BeamScheduler,
    new_id: Callable[[], int],
) -> dict[Sequence, float]:
    """Make the beams that go on, and give each its blocks and its place. Returns them with their log-probabilities.

    The first of several continuations of a beam takes over its last block. The others get a copy of it, as a sample of a
    request does. If a seat or a block is missing, the new beam waits first in the queue, and computes its tokens again as a
    preempted sequence does. The caller retires the beams ``ended``, which are all beams of the step before.
    """
    seats = scheduler.num_seats(ended)
    beams: dict[Sequence, float] = {}
    forks: list[Sequence] = []
    waiting: list[Sequence] = []
    continued: set[Sequence] = set()
    for beam, token_id, logprob in continuations:
        num_tokens = len(beam.token_ids)
        child = Sequence(new_id(), beam.request, 0, num_tokens + 2, [*beam.token_ids, token_id], is_beam=True)
        beams[child] = logprob
        has_blocks = beam.status is SequenceStatus.RUNNING and cache_manager.can_share
        copies = beam in continued and num_tokens % cache_manager.block_size > 0
        if not has_blocks or len(forks) == seats or cache_manager.num_free_blocks < copies:
            waiting.append(child)
            continue
        cache_manager.fork(beam, child, num_tokens, copies=copies)
        child.begin_behind(num_tokens, num_tokens - num_tokens % cache_manager.block_size if copies else num_tokens)
        continued.add(beam)
        forks.append(child)
    scheduler.continue_with(ended, forks, waiting)
    return beams
