"""Plans the next step: continuous batching with chunked prefill and preemption.

Sequences join and leave the batch at every step (Yu et al., "Orca", OSDI 2022). A step has a budget of tokens. Each decode
takes one token of it, and prompts share the rest in chunks, so that a long prompt does not delay the decodes (Agrawal et
al., "Sarathi-Serve", OSDI 2024). A prompt whose beginning is in the prefix cache computes only the rest. The scheduler reads
counts and never token values, so a step can be planned before the last one was read.

The prompt of a request with several samples is computed once, for the first sample. The others wait until K and V of the
prompt are known to be computed, and begin as forks of the first.
"""

from collections import deque
from itertools import islice

from pagebrain.cache import CacheManager
from pagebrain.config import PageBrainConfig
from pagebrain.engine.sequence import ScheduledSequence, Sequence, SequenceGroup, SequenceStatus

WORTH_WAITING_FOR = 16
"""Tokens. A request waits for a running one only if this computes at least as many more that it can share."""


class Scheduler:
    """First come, first served. When blocks run out, the latest arrival is preempted. Later its tokens are computed again,
    or copied back from the swap space.

    ``running`` is ordered by arrival. Preemption takes from the end. So the first running sequence is never preempted for
    another, and every sequence finishes in the end.
    """

    supports = frozenset({"cuda_graph", "async_scheduling", "prefix_caching", "beam_search", "swapping"})

    def __init__(self, config: PageBrainConfig, cache_manager: CacheManager) -> None:
        self.config = config
        self.cache_manager = cache_manager
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._preempted: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(seq)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence that ended or was aborted from its queue; the caller retires its blocks."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def continue_with(self, ended: list[Sequence], forks: list[Sequence], waiting: list[Sequence]) -> None:
        """Let ``forks``, which hold blocks, take the seats of ``ended``, and put ``waiting`` first in the queue.

        The caller retires the blocks of ``ended``. It gives at most :meth:`num_seats` forks.
        """
        place = next((index for index, seq in enumerate(self.running) if seq in ended), len(self.running))
        for seq in ended:
            self.finish(seq)
        self.running[place:place] = forks
        self.waiting.extendleft(reversed(waiting))

    def num_seats(self, ended: list[Sequence]) -> int:
        """Seats that are free when the sequences ``ended`` have left theirs."""
        return self.config.max_num_seqs - sum(seq not in ended for seq in self.running)

    def schedule(self) -> SequenceGroup | None:
        """Plan the next step and take the blocks it needs; ``None`` if there is nothing to compute now."""
        scheduled: list[ScheduledSequence] = []
        num_preempted_before = len(self._preempted)
        prefill_budget = self._schedule_running(scheduled)
        if len(self._preempted) == num_preempted_before:  # no admission in a step in which blocks ran out
            self._admit(scheduled, prefill_budget)
        if not scheduled:
            return None
        preempted, self._preempted = tuple(self._preempted), []
        return SequenceGroup(tuple(scheduled), preempted)

    def _schedule_running(self, scheduled: list[ScheduledSequence]) -> int:
        """Schedule each running sequence's next token or chunk. Returns the budget that is left for new sequences."""
        unscheduled = [seq.num_unscheduled for seq in self.running]
        prefill_budget = self.config.max_num_batched_tokens - unscheduled.count(1)
        running, block_size = self.running, self.config.block_size
        for index, num_tokens in enumerate(unscheduled):
            if index >= len(running):  # preemption shortened the list from its end
                break
            seq = running[index]
            if num_tokens == 1 and seq.num_scheduled % block_size:  # its last block has a slot left: the common case
                scheduled.append(ScheduledSequence(seq, seq.num_scheduled, 1, True))
                continue
            is_prefill = num_tokens > 1
            if is_prefill:
                self._skip(seq, self._cached_blocks(seq))  # another sequence may have computed the next blocks meanwhile
                num_tokens = min(seq.num_unscheduled, prefill_budget)
            if num_tokens > 0 and self._make_room(seq, seq.num_scheduled + num_tokens):
                prefill_budget -= num_tokens if is_prefill else 0
                scheduled.append(self._take(seq, num_tokens))
        return prefill_budget

    def _admit(self, scheduled: list[ScheduledSequence], prefill_budget: int) -> None:
        """Start waiting sequences, while a seat is free, and blocks for all their tokens beside those promised to others."""
        promised: int | None = None
        block_size = self.config.block_size
        prefilling: list[Sequence] = []
        while prefill_budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            if promised is None:
                promised = sum(map(self._num_missing_blocks, self.running))
                prefilling = [seq for seq in self.running if seq.num_computed < seq.num_to_catch_up]
            candidates = islice(self.waiting, self.config.max_num_seqs)  # bounds the time of a step with a long queue
            seq = next((seq for seq in candidates if not self._waits(seq, prefilling)), None)
            if seq is None:
                return
            cached, num_forked = self._cached_blocks(seq), self._num_forkable(seq)
            if seq.num_swapped_tokens > len(cached) * block_size:
                num_forked = 0
            forks = num_forked > 0 and num_forked >= len(cached) * block_size
            num_shared = num_forked // block_size if forks else len(cached) - self.cache_manager.num_unheld(cached)
            if self._num_missing_blocks(seq) - num_shared + promised > self.cache_manager.num_free_blocks:
                return
            self.waiting.remove(seq)
            self.running.append(seq)
            prefilling.append(seq)
            if forks:
                self._fork(seq, num_forked)
            else:
                self._skip(seq, cached)
                if seq.num_cached_tokens is None:
                    seq.num_cached_tokens = seq.num_computed
            if seq.num_swapped_tokens:
                self._swap_in(seq)
            num_tokens = min(seq.num_unscheduled, prefill_budget)
            prefill_budget -= num_tokens
            scheduled.append(self._take(seq, num_tokens))
            promised += self._num_missing_blocks(seq)  # for its later chunks

    def _cached_blocks(self, seq: Sequence) -> list[int]:
        """Cached blocks that continue the sequence's table; none while one of its steps is in flight.

        A request that wants log-probabilities of its prompt computes all of it.
        """
        if seq.num_unread_steps or seq.params.prompt_logprobs is not None:
            return []
        return self.cache_manager.find_prefix(seq)

    def _skip(self, seq: Sequence, cached: list[int]) -> None:
        self.cache_manager.attach(seq, cached)
        seq.skip(len(cached) * self.config.block_size)

    def _swap_in(self, seq: Sequence) -> None:
        """Take the tokens behind the cached blocks back from the swap space."""
        num_tokens, seq.num_swapped_tokens = seq.num_swapped_tokens, 0
        if num_tokens <= seq.num_scheduled:  # all of them are there already
            self.cache_manager.swap_space.drop(seq.seq_id)
        else:
            self.cache_manager.swap_in(seq.seq_id, num_tokens)
            seq.begin_behind(num_tokens, num_certain=seq.num_computed)

    def _waits(self, seq: Sequence, prefilling: list[Sequence]) -> bool:
        """Whether the sequence will have less to compute a few steps later.

        A sample waits until its parent has computed the prompt. A request with the beginning of one that is prefilling waits
        until it can find it in the prefix cache.
        """
        parent = seq.parent
        if parent is not None and not (parent.is_finished or seq.num_preemptions) and self.cache_manager.can_share:
            return parent.num_computed < seq.num_prompt_tokens - 1
        if seq.num_unread_steps or seq.num_swapped_tokens or seq.params.prompt_logprobs is not None:
            return False
        return any(self.cache_manager.will_find(seq, other, WORTH_WAITING_FOR) for other in prefilling)

    def _num_forkable(self, seq: Sequence) -> int:
        """Tokens that the sequence can take over from its parent: the prompt but for its last token, or none.

        The sequence computes the last token itself, because it samples from that one's logits.
        """
        parent, num_tokens = seq.parent, seq.num_prompt_tokens - 1
        if parent is None or seq.num_unread_steps or not self.cache_manager.can_share:
            return 0
        return num_tokens if parent.status is SequenceStatus.RUNNING and parent.num_computed >= num_tokens else 0

    def _fork(self, seq: Sequence, num_tokens: int) -> None:
        assert seq.parent is not None
        self.cache_manager.fork(seq.parent, seq, num_tokens)
        seq.begin_behind(num_tokens, num_tokens - num_tokens % self.config.block_size)

    def _num_missing_blocks(self, seq: Sequence) -> int:
        """Blocks that the sequence lacks for the tokens that it has."""
        return self.cache_manager.num_missing_blocks(seq.seq_id, seq.num_tokens)

    def _take(self, seq: Sequence, num_tokens: int) -> ScheduledSequence:
        start, end = seq.num_scheduled, seq.num_scheduled + num_tokens
        self.cache_manager.grow(seq.seq_id, end)
        return ScheduledSequence(seq, start, num_tokens, samples=end == seq.num_tokens)

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Preempt from the end until ``seq`` can grow to ``num_tokens``. False if ``seq`` must wait or was preempted."""
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            coming = self.cache_manager.num_free_blocks + self.cache_manager.num_retiring_blocks
            if self.cache_manager.num_missing_blocks(seq.seq_id, num_tokens) <= coming:
                return False  # the step in flight frees enough blocks: preempt no sequence
            victim = self.running.pop()
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks and put it first in the queue. Its K and V may go to the swap space.

        It starts again only after its last step was read: the step in which blocks ran out admits no sequence, and all
        steps before it have been read when the next one is planned.
        """
        # Until its first step is launched, the last block of a fork is a copy that is not made yet.
        num_tokens = seq.num_scheduled if seq.status is SequenceStatus.RUNNING else seq.num_computed
        swapped = self.cache_manager.swap_out(seq.seq_id, num_tokens)
        seq.preempt()
        seq.num_swapped_tokens = num_tokens if swapped else 0
        self.waiting.appendleft(seq)
        self.cache_manager.retire(seq)
        self._preempted.append(seq)
