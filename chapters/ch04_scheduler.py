"""Chapter 04: which sequences run in the next step.

Chapters 01 to 03 start a batch and end it when its longest answer is done. Seats stand empty meanwhile, and new requests
wait. But a step takes a few milliseconds, and it does not depend on which sequences were in the step before. So the members
of a step are decided anew at every step (continuous batching, which Yu et al., "Orca", OSDI 2022, call iteration-level
scheduling). A scheduler does three things:

- each running sequence that only needs its next token gets it, in every step;
- prompts share what is left of a budget of tokens, in chunks, so that a long prompt does not delay the running sequences;
- waiting sequences are let in, first come, first served, while there are a seat and blocks.

Blocks are handed out as texts grow, so they can run out in the middle of a text. Then the latest arrival gives its blocks
back and waits again. Its tokens are kept. When it is let in again, K and V are computed again (preemption by recompute).
That gives the same numbers, up to rounding, so the same text follows.

What changes from chapter 03: the loop. Requests become sequences, and the sequences of one step are a *group*; prefill
chunks and decodes are rows of one forward call. Cache and attention stay.

Tasks (38 points, about 3.5 hours):

- 4.1 (12 points) ``Scheduler.share_out``: decodes and prompt chunks within the budget.
- 4.2 (10 points) ``Scheduler.admit``: which sequences may start.
- 4.3 (13 points) ``Scheduler.make_room``: which sequence gives its blocks back, and what becomes of it.
- 4.4 (3 points) ``answer_4_4``: measure and explain: how small may the pool be?

Know first: chapter 03; queues.
In the engine: :class:`pagebrain.engine.scheduler.Scheduler` (which also works while a step is in flight) and
:class:`pagebrain.engine.engine.Engine`. In vLLM: ``vllm/v1/core/sched/scheduler.py``.
From pagebrain: ``PageBrainConfig``, ``SamplingParams``, the data classes of ``pagebrain.engine.sequence`` and the records of
``pagebrain.engine.trace``.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from transformers import GPT2LMHeadModel

from chapters.ch00_baseline import OnLogits, check_prompts, greedy_token
from chapters.ch01_naive_kv_cache import forward
from chapters.ch02_block_table import BlockManager, PagedCache, Rows
from chapters.ch03_paged_attention import attend_paged
from pagebrain import PageBrainConfig, SamplingParams
from pagebrain.engine import sequence as data
from pagebrain.engine.sequence import ScheduledSequence, SequenceGroup
from pagebrain.engine.trace import Observer, StepTrace, trace_step


class Cache(Protocol):
    """What a scheduler asks of a cache; chapter 02's has it, and the engine's."""

    def can_grow(self, seq_id: int, num_tokens: int) -> bool:
        """Whether there are blocks for the sequence to have ``num_tokens`` tokens in all, cached ones included."""

    def grow(self, seq_id: int, num_tokens: int) -> None:
        """Give the sequence the blocks that it lacks to have ``num_tokens`` tokens in all. Raises ``OutOfBlocksError``."""

    def retire(self, seq: data.Sequence) -> None:
        """Take the sequence's blocks back. Here they are free at once; the engine's cache waits for steps in flight."""


class Scheduler:
    """First come, first served. ``running`` is in order of arrival, and so is ``waiting``.

    What the tasks need of a sequence (:class:`pagebrain.engine.sequence.Sequence`):

    - ``num_tokens``: the tokens that it has, prompt and answer so far;
    - ``num_scheduled``: how many of them are computed, so that their K and V are in the cache;
    - ``num_unscheduled``: how many can be computed now. 1 is a decode, or the last token of a prompt. More is a prompt, or a
      text to compute again. 0 is nothing, because the sequence has all tokens that it may have;
    - ``preempt()``: marks the sequence as preempted and sets ``num_scheduled`` to 0. Its tokens stay, so ``num_tokens`` does
      not change. Its blocks are not touched, nor the queues.

    Attributes:
        waiting: sequences that have no seat.
        running: sequences that have one of ``config.max_num_seqs`` seats.
        preempted: the sequences that were preempted in the step that is being planned, in any order.
    """

    supports: frozenset[str] = frozenset()

    def __init__(self, config: PageBrainConfig, cache_manager: Cache) -> None:
        self.config = config
        self.cache_manager = cache_manager
        self.waiting: deque[data.Sequence] = deque()
        self.running: list[data.Sequence] = []
        self.preempted: list[data.Sequence] = []

    def add(self, seq: data.Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(seq)

    def finish(self, seq: data.Sequence) -> None:
        """Remove a sequence that ended from its queue. The caller gives its blocks back."""
        if seq in self.running:
            self.running.remove(seq)
        if seq in self.waiting:
            self.waiting.remove(seq)

    def schedule(self) -> SequenceGroup | None:
        """Plan the next step; ``None`` if there is nothing to do."""
        self.preempted = []
        scheduled, budget = self.share_out()
        if not self.preempted:  # after a preemption there are no blocks for new sequences
            scheduled += self.admit(budget)
        return SequenceGroup(tuple(scheduled), tuple(self.preempted)) if scheduled else None

    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        """Task 4.1: give every running sequence its part of the step. Returns the parts and the tokens that are left.

        A sequence with ``num_unscheduled == 1`` gets its token, wherever it stands. What then remains of
        ``config.max_num_batched_tokens`` goes to the other sequences in order of arrival. Each gets as many tokens as it can
        use, or what is left, even a single token. A sequence that gets no token has no part.

        Before you :meth:`take` a part, ask :meth:`make_room` for the tokens that the sequence then has in the cache. This
        may remove sequences from the end of ``running``, the asking one included. A preempted sequence has no part in
        the step.

        The parts may come in any order. After a preemption the number of tokens that are left does not matter. Nothing is
        kept between calls, and the counts of a sequence are read a few times, not once for every other sequence.
        """
        # BEGIN SOLUTION 4.1
        budget = self.config.max_num_batched_tokens - sum(seq.num_unscheduled == 1 for seq in self.running)
        scheduled = []
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            is_decode = seq.num_unscheduled == 1
            num_tokens = 1 if is_decode else min(seq.num_unscheduled, budget)
            if num_tokens > 0 and self.make_room(seq, seq.num_scheduled + num_tokens):
                budget -= 0 if is_decode else num_tokens
                scheduled.append(self.take(seq, num_tokens))
            index += 1
        return scheduled, budget
        # END SOLUTION

    def admit(self, budget: int) -> list[ScheduledSequence]:
        """Task 4.2: move sequences from ``waiting`` to ``running`` and give each its first part of the step.

        Args:
            budget: tokens that are left of the step, 0 or more.

        Sequences are let in by order of arrival, as long as there are tokens in the budget, a seat, and free blocks for
        *all* tokens that the first in the queue has. If one of these is missing, the first in the queue waits, and so do all
        behind it, even smaller ones. They are not looked at.

        The first part has as many tokens as the sequence has to compute, or what is left of the budget if that is less.
        :meth:`take` gives it the blocks for this part. Returns the parts in order of arrival.
        """
        # BEGIN SOLUTION 4.2
        scheduled = []
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.cache_manager.can_grow(seq.seq_id, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled.append(self.take(seq, min(seq.num_unscheduled, budget)))
            budget -= scheduled[-1].num_tokens
        return scheduled
        # END SOLUTION

    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        """Task 4.3: see to it that ``seq`` can grow to ``num_tokens`` tokens in all, cached ones included.

        Returns whether it can. If the free blocks are enough, nothing else happens. If not, running sequences are preempted,
        the latest arrival first and no more than are needed. ``seq`` is not spared when its turn comes. Then the result is
        False.

        After the call, a preempted sequence is marked as such, once, and its tokens are all there. It waits, it is listed in
        ``preempted`` beside victims of earlier calls, and ``cache_manager.retire`` has been called for it, once. Both queues
        are in order of arrival, as before. (Every sequence that has run arrived before every one that has not.)

        No other blocks come back during the call.
        """
        # BEGIN SOLUTION 4.3
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            victim = self.running.pop()
            victim.preempt()
            self.cache_manager.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True
        # END SOLUTION

    def take(self, seq: data.Sequence, num_tokens: int) -> ScheduledSequence:
        """A sequence's part of the step, with the blocks for it."""
        start, end = seq.num_scheduled, seq.num_scheduled + num_tokens
        self.cache_manager.grow(seq.seq_id, end)
        return ScheduledSequence(seq, start, num_tokens, samples=end == seq.num_tokens)


class StaticScheduler(Scheduler):
    """What chapters 01 to 03 did: a batch is let in when the last one is done. For comparison.

    The size of a batch is limited by seats, by blocks, and by the token budget of the one step in which it is let in. A
    sequence whose prompt gets no token in that step waits for the next batch.
    """

    def admit(self, budget: int) -> list[ScheduledSequence]:
        """No sequence, as long as one runs."""
        return [] if self.running else super().admit(budget)


class FreeAtOnce(PagedCache):
    """Chapter 02's cache. No step is ever in flight here, so the blocks of a sequence that is done are free at once."""

    def retire(self, seq: data.Sequence) -> None:
        """Give the sequence's blocks back."""
        self.free(seq.seq_id)


MakeScheduler = Callable[[PageBrainConfig, FreeAtOnce], Scheduler]


class Engine:
    """The loop: schedule, compute, append, finish. ``history`` has a record of every step: what ran when, and where.

    It grows with every step, so a server sets ``keep_history=False``.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        config: PageBrainConfig,
        on_logits: OnLogits | None = None,
        make_scheduler: MakeScheduler = Scheduler,
        on_step: Observer | None = None,
        keep_history: bool = True,
    ) -> None:
        self.model = model
        self.config = config
        self.on_logits = on_logits
        self.on_step = on_step
        self.keep_history = keep_history
        self._num_steps = 0
        self.cache = self.make_cache()
        self.scheduler = make_scheduler(config, self.cache)
        self.history: list[StepTrace] = []
        self._num_requests = 0

    def make_cache(self) -> FreeAtOnce:
        """The cache that the engine works with."""
        return FreeAtOnce(BlockManager(self.config), self.config)

    def check_request(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Raise ``ValueError`` for a request that could never be served."""
        check_prompts(self.model, [prompt], max_new_tokens)
        num_tokens = len(prompt) + max_new_tokens
        if -(-num_tokens // self.config.block_size) > self.cache.block_manager.num_blocks:
            raise ValueError(f"{num_tokens} tokens never fit into the cache: ask for fewer")

    def add_request(self, prompt: Sequence[int], max_new_tokens: int) -> data.Sequence:
        """Queue a request and return its sequence, which grows with every step that it is in."""
        self.check_request(prompt, max_new_tokens)
        number, self._num_requests = self._num_requests, self._num_requests + 1
        params = SamplingParams(temperature=0, max_tokens=max_new_tokens)
        request = data.Request(str(number), None, tuple(prompt), params, number, number, time.monotonic())
        seq = data.Sequence(number, request, 0, len(prompt) + max_new_tokens)
        self.scheduler.add(seq)
        return seq

    def step(self) -> SequenceGroup | None:
        """One step. Returns the group that was computed, ``None`` if nothing is left to do."""
        group = self.scheduler.schedule()
        if group is None:
            return None
        trace = trace_step(self._num_steps, group, self.cache, self.scheduler)
        self._num_steps += 1
        rows = Rows(self.cache, [(e.seq.seq_id, e.start, e.seq.token_ids[e.start : e.context_len]) for e in group])
        sampling = [index for index, entry in enumerate(group) if entry.samples]
        attend = attend_paged(self.model, self.cache, rows)
        logits = forward(self.model, rows.token_ids, rows.positions, attend, rows.last_rows[sampling])
        for entry in group:
            entry.seq.num_scheduled = entry.seq.num_computed = entry.context_len
            entry.seq.status = data.SequenceStatus.RUNNING
        for index, scores in zip(sampling, logits, strict=True):
            self.append(group.scheduled[index].seq, scores)
        trace = trace.read(entry.seq.seq_id for entry in group if entry.seq.is_finished)
        if self.keep_history:
            self.history.append(trace)
        if self.on_step is not None:
            self.on_step(trace)
        return group

    def append(self, seq: data.Sequence, scores: Tensor) -> None:
        """Append the next token of a sequence, chosen by its scores ``[vocab_size]``. It may be the last one."""
        if self.on_logits is not None:
            self.on_logits(seq.seq_id, scores)
        seq.token_ids.append(self.choose(seq, scores))
        if seq.token_ids[-1] == self.model.config.eos_token_id or len(seq.token_ids) == seq.max_num_tokens:
            self.finish(seq)

    def choose(self, seq: data.Sequence, scores: Tensor) -> int:
        """The next token of a sequence: the one with the highest score."""
        return greedy_token(scores)

    def finish(self, seq: data.Sequence) -> None:
        """End a sequence that is done or was cancelled. Its blocks are free at once."""
        self.scheduler.finish(seq)
        self.cache.retire(seq)
        seq.status = data.SequenceStatus.FINISHED


def answer_4_4() -> tuple[float, str]:
    """Task 4.4: how small may the pool be?

    The notebook's section *When blocks run out* serves four requests that arrive together: prompts of 8, 5, 7 and 3 tokens,
    answers of 12, 14, 9 and 4 tokens. There are three seats, blocks of 4 slots, and 9 blocks, which are too few. Measure:
    what is the smallest ``num_blocks`` with which no sequence is preempted?

    Returns the number, and one to four sentences, at least 8 different words: why is it smaller than the sum of the blocks
    that the four texts need at their full lengths, and why may an operator choose a pool that is smaller still? The text
    goes to the instructor.
    """
    # BEGIN SOLUTION 4.4
    text = (
        "The texts are never all at their full length at the same time: D has a seat only after another one has ended, and "
        "each text holds blocks for the tokens that it has, not for those that it will have. A smaller pool costs some "
        "tokens that are computed twice, but less memory stands empty."
    )
    return 12.0, text
    # END SOLUTION


def half_the_room(model: GPT2LMHeadModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> PageBrainConfig:
    """A config with blocks for half of what all requests together might need, and for each of them on its own."""
    block_size = 16
    needs = [-(-(len(prompt) + max_new_tokens) // block_size) for prompt in prompts]
    return PageBrainConfig.for_model(
        model,
        block_size=block_size,
        num_blocks=max(2, sum(needs) // 2, *needs),
        max_num_seqs=16,
        max_num_batched_tokens=64,
    )


def generate(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_logits: OnLogits | None = None,
    *,
    config: PageBrainConfig | None = None,
    on_step: Observer | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, continuously batched; without a ``config``, with :func:`half_the_room`.

    ``on_step`` is called with the record of every step.
    """
    check_prompts(model, prompts, max_new_tokens)
    engine = Engine(model, config or half_the_room(model, prompts, max_new_tokens), on_logits, on_step=on_step)
    sequences = [engine.add_request(prompt, max_new_tokens) for prompt in prompts]
    while engine.step() is not None:
        pass
    return [seq.output_token_ids for seq in sequences]
