"""Requests, sequences, and the group of sequences that one forward call computes.

These are plain data. The engine, the chapters and the parts of learners share them. A :class:`Request` is what a user asked
for. It becomes ``n`` :class:`Sequence` objects. At each step the scheduler puts some of them, with the tokens to compute,
into a :class:`SequenceGroup`. (Early vLLM used "sequence group" for the samples of one request. Here it is always the batch
of one forward call.)

With async scheduling a step is planned before the previous one was read. So a sequence has two counts: tokens *scheduled*
and tokens *computed*. It also counts the sampled tokens that the engine has not read. The scheduler needs only counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import blake2b
from typing import Literal, NamedTuple

from pagebrain.block import BlockKey
from pagebrain.cache import NewBlocks, TableChanges
from pagebrain.outputs import FinishReason, TokenLogprobs
from pagebrain.sampling_params import BeamSearchParams, SamplingParams

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Request:
    """What a user asked for, checked and tokenized.

    All random numbers of the request derive from ``seed``, which the user gave or the engine chose. ``arrival_index`` counts
    requests. "First come, first served" means by this number. Requests share cached prefixes within one ``cache_salt``.
    With ``beam_params`` it is a request for beam search. Then ``params`` are those of each beam's steps.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrival_index: int
    arrival_s: float
    cache_salt: str | None = None
    beam_params: BeamSearchParams | None = None

    @property
    def first_parent(self) -> bytes:
        """The parent hash of the first block, see :meth:`BlockKey.after <pagebrain.block.BlockKey.after>`."""
        return b"" if self.cache_salt is None else blake2b(self.cache_salt.encode(), digest_size=16).digest()


class SequenceStatus(Enum):
    """The state of a sequence. A preempted sequence waits like a new one; traces show it as preempted."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """One stream of tokens with its sampling state.

    Attributes:
        seq_id: unique in the engine's life; keys the block table.
        request: shared by the ``n`` samples.
        sample_index: number of the sample, from 0.
        max_num_tokens: limit of prompt and output together.
        token_ids: the prompt, then every output token read so far.
        num_scheduled: leading tokens whose K and V are in the cache or are computed by a step in flight.
        num_computed: leading tokens whose K and V are in the cache.
        num_unread_steps: steps in flight that compute tokens of this sequence.
        num_unread_tokens: tokens that those steps sample. Their number is known, their values are not.
        num_to_catch_up: leading tokens that were known when the sequence started, or started again after a preemption. The
            sequence prefills until all of them are scheduled. Then it decodes.
        num_swapped_tokens: leading tokens whose K and V are in the swap space.
        num_cached_tokens: prompt tokens that were in the prefix cache when the sequence first started; ``None`` before that.
        block_keys: keys of its first full blocks, see :class:`~pagebrain.block.BlockKey`. The cache manager fills it.
        parent: the first sample of the request, whose prompt this one shares; ``None`` for the first sample itself.
        is_beam: whether it is a beam, which samples one token and is then continued by others.
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
    num_swapped_tokens: int = 0
    num_cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    block_keys: list[BlockKey] = field(default_factory=list)
    parent: "Sequence | None" = None
    is_beam: bool = False

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
        """Prompt and output tokens, with those that were sampled and not read."""
        return len(self.token_ids) + self.num_unread_tokens

    @property
    def num_unscheduled(self) -> int:
        """Tokens that the next step could compute for this sequence: 1 is a decode, more are a prefill, 0 is nothing.

        The last token that a sequence may hold is never computed, because no token follows it.
        """
        num_tokens = len(self.token_ids) + self.num_unread_tokens  # the property num_tokens would cost another call
        return 0 if num_tokens >= self.max_num_tokens else num_tokens - self.num_scheduled

    def skip(self, num_tokens: int) -> None:
        """Count the next ``num_tokens`` tokens as computed: their K and V were found in the prefix cache."""
        self.num_scheduled += num_tokens
        self.num_computed += num_tokens

    def begin_behind(self, num_tokens: int, num_certain: int) -> None:
        """Begin behind ``num_tokens`` tokens of a parent, or of the swap space.

        The executor has not made the copies yet. Until the first step was read, only the first ``num_certain`` tokens count
        as computed. If one token is left, it is a decode.
        """
        self.num_scheduled, self.num_computed = num_tokens, num_certain
        if self.num_tokens == num_tokens + 1:
            self.num_to_catch_up = num_tokens

    def preempt(self) -> None:
        """Reset the counts. The tokens stay, and K and V of all of them are computed again later."""
        self.status = SequenceStatus.PREEMPTED
        self.num_scheduled = self.num_computed = 0
        self.num_to_catch_up = self.num_tokens
        self.num_preemptions += 1

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Mark the sequence as ended."""
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.status is SequenceStatus.FINISHED


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step: compute tokens ``start .. start + num_tokens - 1``.

    ``samples`` is true if they include the sequence's last token, so that the step samples the next one. (A named tuple is
    quick to make, and a step makes one for every sequence.)
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def context_len(self) -> int:
        """Tokens cached plus tokens of this step."""
        return self.start + self.num_tokens

    @property
    def phase(self) -> Phase:
        """``prefill`` while the sequence computes tokens that it had at its start, ``decode`` when it extends its text.

        It depends on the sequence's state, so read it when the step is planned. A chunk of one token is a prefill too.
        """
        return "prefill" if self.start < self.seq.num_to_catch_up else "decode"


@dataclass(frozen=True)
class SequenceGroup:
    """The plan of one forward call: prefill chunks, decodes, and the changes to make before they are computed.

    The scheduler fills ``scheduled`` and ``preempted``. The cache manager adds the rest from its block tables. An executor
    applies the changes in this order: released, new blocks, swapped out, swapped in, copied blocks.

    Attributes:
        scheduled: the tokens to compute of each sequence.
        preempted: sequences that lost their blocks while this step was planned.
        released: ids of sequences whose state the executor drops. The same plan may schedule such a sequence again, which
            then gets new state.
        new_blocks: blocks added to the tables of sequences that are scheduled now or later.
        copied_blocks: ``(from, to)``: blocks whose K and V are copied, in all layers.
        swapped_out, swapped_in: ``(block, slot)`` and ``(slot, block)``: blocks whose K and V are copied to slots of the
            swap space, and back.
    """

    scheduled: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()
    released: tuple[int, ...] = ()
    new_blocks: tuple[NewBlocks, ...] = ()
    copied_blocks: tuple[tuple[int, int], ...] = ()
    swapped_out: tuple[tuple[int, int], ...] = ()
    swapped_in: tuple[tuple[int, int], ...] = ()

    def with_changes(self, changes: TableChanges) -> "SequenceGroup":
        """This plan with the changes of the block tables."""
        if not changes.released and not changes.new_blocks and not changes.swapped_out:  # the others come with new blocks
            return self
        return SequenceGroup(self.scheduled, self.preempted, *changes)

    def __iter__(self) -> Iterator[ScheduledSequence]:
        return iter(self.scheduled)

    def __len__(self) -> int:
        return len(self.scheduled)

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward call computes."""
        return sum(entry.num_tokens for entry in self.scheduled)
