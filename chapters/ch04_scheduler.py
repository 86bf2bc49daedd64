"""Chapter 04: who runs in the next step.

Chapters 01 to 03 start a batch and end it when its longest answer is done: seats stand empty, and whoever comes meanwhile
waits. But a step is a few milliseconds, and nothing ties its members to those of the next. So decide anew at every step who
is in it (continuous batching, which Yu et al., "Orca", OSDI 2022, call iteration-level scheduling). A scheduler does three
things:

- whoever is running and only needs its next token gets one, in every step;
- prompts get what is left of a budget of tokens, in chunks, so that a long one does not hold up those who are writing;
- whoever waits is let in, first come first served, when there are a seat and blocks.

Blocks are handed out as texts grow, so they can run out in mid-sentence. Then the latest arrival gives its own back and
waits again. Its tokens are kept; when its turn comes, K and V are computed again (preemption by recompute), and since that
gives the same numbers, up to rounding, the same text follows.

What changes from chapter 03: the loop. Requests become sequences, and the sequences of one step are a *group*; prefill
chunks and decodes are rows of one forward call. Cache and attention stay.

Tasks (35 points, about 6 hours):

- 4.1 (12 points) ``Scheduler.share_out``: decodes and prompt chunks within the budget.
- 4.2 (10 points) ``Scheduler.admit``: who may start.
- 4.3 (13 points) ``Scheduler.make_room``: whose blocks are taken, and what becomes of them.

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
        """Hand the sequence what it lacks to have ``num_tokens`` tokens in all. Raises ``OutOfBlocksError``."""

    def retire(self, seq: data.Sequence) -> None:
        """Take the sequence's blocks back. Here they are free at once; the engine's cache waits for steps in flight."""


class Scheduler:
    """First come, first served. ``running`` is in order of arrival, and so is ``waiting``."""

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
        """Forget a sequence that ended, wherever it stands. Whoever calls this gives its blocks back."""
        if seq in self.running:
            self.running.remove(seq)
        if seq in self.waiting:
            self.waiting.remove(seq)

    def schedule(self) -> SequenceGroup | None:
        """Plan the next step; ``None`` if there is nothing to do."""
        self.preempted = []
        scheduled, budget = self.share_out()
        if not self.preempted:  # blocks just ran out: nobody new now
            scheduled += self.admit(budget)
        return SequenceGroup(tuple(scheduled), tuple(self.preempted)) if scheduled else None

    def share_out(self) -> tuple[list[ScheduledSequence], int]:
        """Task 4.1: give every running sequence its part of the step. Returns the parts and the tokens that are left.

        ``seq.num_unscheduled`` tokens of a sequence can be computed now. Those with one token get it; that may also be the
        last token of a prompt. What then remains of ``config.max_num_batched_tokens`` goes to the others, in order of
        arrival, each as much as it can use, be it a single token. Before you :meth:`take` a sequence, ask :meth:`make_room`
        whether its blocks are there; that may remove sequences from the end of ``running``, and who was preempted has no
        part in the step.

        The parts may come in any order. After a preemption nobody looks at the tokens that are left.
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

        In order of arrival, while there are tokens in the budget, a seat (``config.max_num_seqs``), and blocks for all the
        tokens that the first in the queue has. Who comes later never overtakes, even if it is smaller.
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
        """Task 4.3: see to it that ``seq`` can grow to ``num_tokens`` tokens. Returns whether it can.

        While it cannot, the latest arrival among ``running`` is preempted: ``seq.preempt()`` marks it, its blocks go to
        ``cache_manager.retire``, it is noted in ``preempted``, and it waits at the front of the queue. If that was ``seq``
        itself, the answer is no.
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

    A batch is as large as seats and blocks allow, and also as the token budget of the one step in which it is let in: whose
    prompt finds no token left there waits for the next batch.
    """

    def admit(self, budget: int) -> list[ScheduledSequence]:
        """Nobody, unless nobody runs."""
        return [] if self.running else super().admit(budget)


class FreeAtOnce(PagedCache):
    """Chapter 02's cache. No step is ever in flight here, so the blocks of a sequence that is done are free at once."""

    def retire(self, seq: data.Sequence) -> None:
        """Give the sequence's blocks back."""
        self.free(seq.seq_id)


MakeScheduler = Callable[[PageBrainConfig, FreeAtOnce], Scheduler]


class Engine:
    """The loop: schedule, compute, append, finish. ``history`` has a record of every step: who ran when, and where.

    An engine that runs for days should not keep it.
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
        self.cache = FreeAtOnce(BlockManager(config), config)
        self.scheduler = make_scheduler(config, self.cache)
        self.history: list[StepTrace] = []
        self._num_requests = 0

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
            seq = group.scheduled[index].seq
            if self.on_logits is not None:
                self.on_logits(seq.seq_id, scores)
            seq.token_ids.append(greedy_token(scores))
            if seq.token_ids[-1] == self.model.config.eos_token_id or len(seq.token_ids) == seq.max_num_tokens:
                self.finish(seq)
        trace = trace.read(entry.seq.seq_id for entry in group if entry.seq.is_finished)
        if self.keep_history:
            self.history.append(trace)
        if self.on_step is not None:
            self.on_step(trace)
        return group

    def finish(self, seq: data.Sequence) -> None:
        """End a sequence, because it is done or because nobody wants it any more; its blocks come back at once."""
        self.scheduler.finish(seq)
        self.cache.retire(seq)
        seq.status = data.SequenceStatus.FINISHED


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
