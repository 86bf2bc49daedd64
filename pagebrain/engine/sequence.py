"""Requests, sequences, and the group of sequences that one forward call computes.

These are plain data, shared by the engine, the chapters and whatever a learner writes. A :class:`Request` is what a user
asked for; it becomes ``n`` :class:`Sequence` objects; each step the scheduler puts some of them, with the tokens to compute,
into a :class:`SequenceGroup`. (Early vLLM used "sequence group" for the samples of one request. Here it is always the batch
of one forward call.)

Launching ahead means that a step is planned before the previous one was read. So a sequence counts what was *scheduled* and
what was *computed* apart, and counts sampled tokens that nobody has read yet; the scheduler needs only counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal, NamedTuple

from pagebrain.cache import NewBlocks
from pagebrain.outputs import FinishReason, TokenLogprobs
from pagebrain.sampling_params import SamplingParams

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Request:
    """What a user asked for, checked and tokenized.

    ``seed`` is the one that all random numbers of this request derive from, the user's own or one the engine chose.
    ``arrival_index`` counts requests; first come, first served means by this number.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrival_index: int
    arrival_s: float


class SequenceStatus(Enum):
    """Where a sequence stands. A preempted one waits again, and says so for whoever watches."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """One stream of tokens with its sampling state.

    Attributes:
        seq_id: unique in the engine's life; keys the block table.
        request: what was asked for; shared by the ``n`` samples.
        sample_index: which of them this is, from 0.
        max_num_tokens: prompt and output together never exceed this many tokens.
        token_ids: prompt, then every output token read so far.
        num_scheduled: leading tokens whose K and V are in the cache or in a step under way.
        num_computed: leading tokens whose K and V are known to be in the cache.
        num_unread_steps: steps launched with this sequence in them and not read yet.
        num_unread_tokens: tokens those steps sample; their values are not known yet, their number is.
        num_to_catch_up: leading tokens that were known when the sequence began, or began anew after a preemption. Until all
            of them are scheduled it prefills; then it decodes.
    """

    seq_id: int
    request: Request
    sample_index: int
    max_num_tokens: int
    token_ids: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    num_scheduled: int = 0
    num_computed: int = 0
    num_unread_steps: int = 0
    num_unread_tokens: int = 0
    num_to_catch_up: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.request.prompt_token_ids)
        self.num_to_catch_up = len(self.token_ids)

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters of the request."""
        return self.request.params

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens generated and read so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, those sampled but not read included."""
        return len(self.token_ids) + self.num_unread_tokens

    @property
    def num_unscheduled(self) -> int:
        """Tokens that the next step could compute for this sequence: 1 is a decode, more are a prefill, 0 is nothing.

        The last token that a sequence may hold is never computed: nothing follows it.
        """
        num_tokens = len(self.token_ids) + self.num_unread_tokens  # num_tokens, asked for too often for another call
        return 0 if num_tokens >= self.max_num_tokens else num_tokens - self.num_scheduled

    def preempt(self) -> None:
        """Forget that anything was computed. The tokens stay; K and V of all of them are computed again in a later turn."""
        self.status = SequenceStatus.PREEMPTED
        self.num_scheduled = self.num_computed = 0
        self.num_to_catch_up = self.num_tokens
        self.num_preemptions += 1

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Note that the sequence has ended, and why."""
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason

    @property
    def is_finished(self) -> bool:
        """Whether no more tokens will be appended."""
        return self.status is SequenceStatus.FINISHED


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step: compute tokens ``start .. start + num_tokens - 1``.

    ``samples`` is true if they reach the end of what is there, so that the step samples the sequence's next token. (A named
    tuple, for one is made for every sequence of every step.)
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def context_len(self) -> int:
        """Tokens that the last query of this step attends to: those cached plus those of this step."""
        return self.start + self.num_tokens

    @property
    def phase(self) -> Phase:
        """``prefill`` while the sequence catches up with tokens that it has, ``decode`` when it extends its text.

        A state of the sequence, so ask when the step is planned. The number of tokens does not tell: a chunk may have one.
        """
        return "prefill" if self.start < self.seq.num_to_catch_up else "decode"


@dataclass(frozen=True)
class SequenceGroup:
    """The plan of one forward call: prefill chunks and decodes side by side, and all that changes before they are computed.

    A scheduler says what is computed and who was preempted. The rest is added by the cache manager, in which the scheduler
    has taken blocks meanwhile; an executor applies it in this order: released, new blocks, copied blocks.

    Attributes:
        scheduled: which tokens of which sequences are computed.
        preempted: the sequences that lost their blocks while this step was planned.
        released: ids of sequences for which the executor keeps nothing any more. One that was preempted may be scheduled
            again in the same plan, and then starts anew.
        new_blocks: what was added to block tables, of sequences that are scheduled now or later.
        copied_blocks: ``(from, to)``: blocks whose K and V are copied, of all layers.
    """

    scheduled: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()
    released: tuple[int, ...] = ()
    new_blocks: tuple[NewBlocks, ...] = ()
    copied_blocks: tuple[tuple[int, int], ...] = ()

    def __iter__(self) -> Iterator[ScheduledSequence]:
        return iter(self.scheduled)

    def __len__(self) -> int:
        return len(self.scheduled)

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward call computes."""
        return sum(entry.num_tokens for entry in self.scheduled)
