"""Chapter 07: where the CPU's time goes, and how to save it.

A decode step consists of a few hundred kernels of a few microseconds each. The GPU finishes a kernel before Python has
launched the next. So the CPU sets the pace: it launches, and in between it plans, makes tensors and waits. Four habits
change that:

- the state of sequences lies on the GPU in *batch rows*. Each running sequence has a fixed row, and only changes travel;
- a *CUDA graph* is a recording of launches, which one call launches again. There is one for each size of batch, the
  *bucket*. It holds all launches of a decode step, from embedding to sampled token, and works on buffers that never move;
- a batch that is smaller than its bucket is padded with a *dummy sequence*, which has a block of its own. So kernels treat
  all rows alike;
- step N+1 is *launched ahead*, while step N is *in flight* (launched, and not read yet). Its input, the sampled token, is in
  the batch row already.

What changes from chapter 04: how a step is computed, and when its results are read. Prompts are computed as before, beside
the graph.

Tasks (38 points, about 7 hours):

- 7.1 (8 points) ``BatchRows.update`` and ``release``: a row for each sequence at work; only changes travel.
- 7.2 (6 points) ``bucket_for`` and ``BatchRows.activate``: the rows that a step computes, padded to a bucket.
- 7.3 (8 points) ``decode_step``: from batch row to batch row, and the host reads nothing.
- 7.4 (7 points) ``Engine.step`` and ``apply``: launch first, read later, discard what is past the end.
- 7.5 (6 points) ``LateRetirement.collect`` and ``Scheduler.make_room``: blocks that come back late; needs 7.4.
- 7.6 (3 points) ``answer_7_6``: which gap in the timeline the host makes, measured and explained.

Know first: chapter 04; that a GPU works in the order in which work was launched, while the CPU goes on.
From pagebrain: ``PageBrainConfig``, ``model_config.attention_scale``, the data classes of ``pagebrain.engine.sequence`` and
the records of ``pagebrain.engine.trace``.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from chapters import ch04_scheduler
from chapters.aids.capture import Download, capture, upload
from chapters.ch00_baseline import OnLogits, check_prompts
from chapters.ch01_naive_kv_cache import Attend, forward, masked_attention
from chapters.ch02_block_table import PagedCache, Rows
from chapters.ch03_paged_attention import attend_paged
from chapters.ch04_scheduler import half_the_room
from pagebrain import PageBrainConfig
from pagebrain.engine import sequence as data
from pagebrain.engine.sequence import ScheduledSequence, SequenceGroup, SequenceStatus
from pagebrain.engine.trace import Observer, StepTrace, trace_step
from pagebrain.model_config import attention_scale

TOKEN, CONTEXT, BLOCKS = 0, 1, 2
"""Columns of ``BatchRows.state``; the block table begins at the last."""


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    """Task 7.2: the smallest of ``buckets``, any numbers in any order, that is not less than ``num_rows``.

    Raises ``ValueError`` if there is none.
    """
    # BEGIN SOLUTION 7.2
    fitting = [bucket for bucket in buckets if bucket >= num_rows]
    if not fitting:
        raise ValueError(f"{num_rows} rows fit into none of the buckets {list(buckets)}")
    return min(fitting)
    # END SOLUTION


class BatchRows:
    """What the GPU holds about each sequence at work: a row of numbers, in the same place for as long as the sequence runs.

    Attributes:
        state: int64 ``[dummy_row + 1, 2 + max_blocks]``. Views of its columns are ``token_ids``, the next token to compute;
            ``context_lens``, the tokens cached before it; and ``block_tables``, whose entries past a sequence's blocks may
            be any block. The last row, ``dummy_row``, is the dummy sequence's.
        active_rows: int64 ``[max_num_seqs]``; the first of them are the rows that a step computes. Like ``state``, this is
            written to and never bound to another tensor: a graph knows addresses, not names.
        free: rows that belong to no sequence.
        row_of, num_sent: sequence id -> its row, and how many blocks of its table are in the row.
    """

    def __init__(self, config: PageBrainConfig, dummy_block: int) -> None:
        assert config.max_model_len is not None
        self.device = torch.device(config.device)
        # Twice the seats: a sequence that ended keeps its row until its last step is read, while another has its seat.
        self.dummy_row = 2 * config.max_num_seqs
        self.free = list(range(self.dummy_row))
        self.row_of: dict[int, int] = {}
        self.num_sent: dict[int, int] = {}
        shape = self.dummy_row + 1, BLOCKS + config.blocks_for(config.max_model_len)
        self.state = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.token_ids, self.context_lens = self.state[:, TOKEN], self.state[:, CONTEXT]
        self.block_tables = self.state[:, BLOCKS:]
        self.block_tables[self.dummy_row].fill_(dummy_block)
        self.active_rows = torch.full((config.max_num_seqs,), self.dummy_row, device=self.device)

    def send(self, changes: Sequence[tuple[int, int, int]]) -> None:
        """Write numbers into ``state``, given as ``(row, column, number)``. All of them travel in one piece."""
        if changes:
            rows, columns, numbers = upload(list(zip(*changes)), self.device)
            self.state[rows, columns] = numbers

    def update(self, group: SequenceGroup, cache: PagedCache) -> list[int]:
        """Task 7.1: ``send``, in one call, what a step needs and the GPU does not know. Returns the row of each entry.

        A sequence without a row takes a free one, and everything about the sequence travels: the token at ``entry.start``,
        the context length (``entry.start`` tokens are cached before it) and the whole block table. If a sequence has a
        row, only the blocks travel that are new in its table, because the steps themselves keep token and context length
        up to date. All changes go through ``send``, and nothing is read back from the GPU: the host would wait for it.
        """
        # BEGIN SOLUTION 7.1
        changes = []
        for entry in group:
            seq_id = entry.seq.seq_id
            if seq_id not in self.row_of:
                row = self.row_of[seq_id] = self.free.pop()
                self.num_sent[seq_id] = 0
                changes += [(row, TOKEN, entry.seq.token_ids[entry.start]), (row, CONTEXT, entry.start)]
            table, row = cache.block_table(seq_id), self.row_of[seq_id]
            changes += [(row, BLOCKS + page, table[page]) for page in range(self.num_sent[seq_id], len(table))]
            self.num_sent[seq_id] = len(table)
        self.send(changes)
        return [self.row_of[entry.seq.seq_id] for entry in group]
        # END SOLUTION

    def release(self, seq_id: int) -> None:
        """Task 7.1: take a sequence's row back, if it has one. If the sequence comes again, it is treated as a new one."""
        # BEGIN SOLUTION 7.1
        if seq_id in self.row_of:
            self.free.append(self.row_of.pop(seq_id))
            del self.num_sent[seq_id]
        # END SOLUTION

    def activate(self, rows: Sequence[int], bucket: int) -> None:
        """Task 7.2: write ``rows``, and then ``dummy_row`` as padding, into the first ``bucket`` entries of ``active_rows``.

        Entries behind them may hold anything: a step of this bucket does not read them.

        All of them travel in one ``upload``. On a GPU each number written alone would be a launch, and a plain
        ``torch.tensor`` a copy for which the host waits.
        """
        # BEGIN SOLUTION 7.2
        padded = [*rows, *[self.dummy_row] * (bucket - len(rows))]
        self.active_rows[:bucket].copy_(upload(padded, self.device))
        # END SOLUTION


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    """Task 7.3: compute one token of each of the first ``len(sampled)`` active rows.

    ``rows.token_ids`` has the token, and ``context_lens`` its position. K and V go to the token's slot, the scores into
    ``logits`` ``[bucket, vocab_size]``, and the best next token into ``sampled`` ``[bucket]`` and into the row. The row's
    context grows by one, except the dummy sequence's: after each step it is 0, so the dummy stays in its block.

    Python runs this function once, to capture it. So everything that differs from step to step is read from ``rows`` on the
    GPU, results go into tensors that were there before, and no shape depends on a value. No value comes to the host
    (``item``, ``tolist``, ``if``), and none from it: ``x[i] = 0`` copies a number from the host, ``zero_()`` and ``fill_()``
    launch a kernel, and a new tensor is made with ``device=rows.device``. The model runs once, and the pools are not copied.
    """
    # BEGIN SOLUTION 7.3
    active = rows.active_rows[: len(sampled)]  # [bucket]
    positions, tables = rows.context_lens[active], rows.block_tables[active]  # [bucket], [bucket, max_blocks]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    all_rows = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, all_rows))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()
    # END SOLUTION


def attend_rows(model: GPT2LMHeadModel, cache: PagedCache, tables: Tensor, slots: Tensor, positions: Tensor) -> Attend:
    """Attention of one query a row, ``[num_rows]`` of them, with shapes that no length changes.

    Chapter 03's loop ends at the longest context, and the host has to read that. So here the whole table is gathered, and
    what lies past a row's position is masked. (A kernel does not need this: each program reads on the GPU where to end.)
    """

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.write(layer, slots, key, value)
        keys, values = (pools[layer][tables].flatten(1, 2) for pools in (cache.key_pools, cache.value_pools))
        scale = attention_scale(model.config, layer)  # keys and values: [num_rows, max_len, num_heads, head_dim]
        return masked_attention(query[:, None], keys, values, positions[:, None], scale)[:, 0]

    return attend


@dataclasses.dataclass
class InFlight:
    """A step that was launched. ``sampling`` are those of its group that sample, in the order of tokens and logits."""

    group: SequenceGroup
    sampling: list[ScheduledSequence]
    tokens: Download
    logits: Tensor | None
    trace: StepTrace | None = None


class Executor:
    """Computes steps: decodes with a graph (without ``use_graphs``, launch by launch), chunks of prompts as chapter 04."""

    def __init__(
        self, model: GPT2LMHeadModel, config: PageBrainConfig, cache: PagedCache, use_graphs: bool, keep_logits: bool
    ) -> None:
        self.model, self.cache, self.keep_logits = model, cache, keep_logits
        (dummy_block,) = cache.block_manager.allocate(1)  # the dummy sequence's, for good
        self.rows = BatchRows(config, dummy_block)
        self.active: list[int] = []  # the rows that ``active_rows`` names
        device, seats = self.rows.device, config.max_num_seqs
        self.logits = torch.zeros(seats, model.config.vocab_size, dtype=model.dtype, device=device)
        self.sampled = torch.zeros(seats, dtype=torch.int64, device=device)
        self.steps: dict[int, Callable[[], None]] = {}  # bucket -> the step of that many rows
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        for bucket in sorted({seats, *(2**power for power in range(seats.bit_length()))}, reverse=True):
            # Captured now, when all active rows are the dummy's: the capture writes into no sequence's blocks.
            step = partial(decode_step, model, cache, self.rows, self.logits[:bucket], self.sampled[:bucket])
            self.steps[bucket] = capture(step, device, pool) if use_graphs else step

    def launch(self, group: SequenceGroup) -> InFlight:
        """Start a step whose blocks are allocated. It does not wait for the GPU, unless the step has prompts."""
        rows = dict(zip(group, self.rows.update(group, self.cache)))
        # A prompt's chunk of one token with more to come is no decode: the next token is the prompt's, not a sampled one.
        decodes = [entry for entry in group if entry.num_tokens == 1 and entry.samples]
        chunks = [entry for entry in group if entry.num_tokens > 1 or not entry.samples]
        if decodes:
            bucket = bucket_for(len(decodes), list(self.steps))
            if (active := [rows[entry] for entry in decodes]) != self.active:
                self.rows.activate(active, bucket)
                self.active = active
            self.steps[bucket]()
        logits, sampled = self.logits[: len(decodes)], self.sampled[: len(decodes)]
        ends = [entry for entry in chunks if entry.samples]
        if chunks:
            scores = self.prefill(chunks)
            self.rows.send([(rows[entry], CONTEXT, entry.context_len) for entry in chunks])
            self.rows.send([(rows[e], TOKEN, e.seq.token_ids[e.context_len]) for e in chunks if not e.samples])
            self.rows.token_ids[upload([rows[entry] for entry in ends], self.rows.device)] = scores.argmax(dim=-1)
            logits, sampled = torch.cat([logits, scores]), torch.cat([sampled, scores.argmax(dim=-1)])
        # Copies, because the next step uses the same buffers, and it may be launched before this one is read.
        return InFlight(group, decodes + ends, Download(sampled), logits.clone() if self.keep_logits else None)

    def prefill(self, chunks: Sequence[ScheduledSequence]) -> Tensor:
        """Compute chunks of prompts, whose tokens the host knows. Returns the scores of those that sample."""
        flat = Rows(self.cache, [(e.seq.seq_id, e.start, e.seq.token_ids[e.start : e.context_len]) for e in chunks])
        last_rows = flat.last_rows[[index for index, entry in enumerate(chunks) if entry.samples]]
        return forward(self.model, flat.token_ids, flat.positions, attend_paged(self.model, self.cache, flat), last_rows)


class LateRetirement:
    """Blocks and batch rows come back when no step in flight uses them; until then their sequences are ``pending``."""

    def __init__(self, cache: PagedCache, rows: BatchRows) -> None:
        self.cache = cache
        self.rows = rows
        self.pending: dict[int, data.Sequence] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks that are on their way back."""
        return sum(len(self.cache.block_table(seq_id)) for seq_id in self.pending)

    def retire(self, seq: data.Sequence) -> None:
        """Free the sequence's blocks and row, now or when the last step with it has been read."""
        self.pending[seq.seq_id] = seq
        self.collect()

    def collect(self) -> None:
        """Task 7.5: free blocks and row of each pending sequence that is in no step in flight; it is not pending any more.

        ``seq.num_unread_steps`` counts the steps with the sequence that were launched and not read. The engine calls
        ``collect`` after it has read a step.
        """
        # BEGIN SOLUTION 7.5
        for seq in [seq for seq in self.pending.values() if seq.num_unread_steps == 0]:
            del self.pending[seq.seq_id]
            self.cache.free(seq.seq_id)
            self.rows.release(seq.seq_id)
        # END SOLUTION


class Scheduler(ch04_scheduler.Scheduler):
    """Chapter 04's scheduler, for blocks that come late. It plans from counts alone, before tokens are read."""

    supports = frozenset({"async_scheduling"})

    def __init__(self, config: PageBrainConfig, cache: ch04_scheduler.FreeAtOnce, retirement: LateRetirement) -> None:
        super().__init__(config, cache)
        self.retirement = retirement

    def make_room(self, seq: data.Sequence, num_tokens: int) -> bool:
        """Task 7.5: make room, so that ``seq`` can grow to ``num_tokens`` tokens. Returns whether it can grow now.

        As in chapter 04, but a victim's blocks may come late: ``self.retirement.retire(victim)`` takes the place of
        ``self.cache_manager.retire(victim)``, which would free them at once. While blocks are on their way back
        (``retirement.num_blocks``), no sequence is preempted: the answer is ``False``, ``seq`` keeps its blocks, and it
        asks again in the next step.
        """
        # BEGIN SOLUTION 7.5
        while not self.cache_manager.can_grow(seq.seq_id, num_tokens):
            if self.retirement.num_blocks > 0:
                return False
            victim = self.running.pop()
            victim.preempt()
            self.retirement.retire(victim)
            self.preempted.append(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True
        # END SOLUTION


class Engine(ch04_scheduler.Engine):
    """The loop with steps in flight: with ``config.async_scheduling`` one while the next is planned (depth 1), else none."""

    def __init__(
        self,
        model: GPT2LMHeadModel,
        config: PageBrainConfig,
        on_logits: OnLogits | None = None,
        *,
        on_step: Observer | None = None,
        keep_history: bool = True,
        use_graphs: bool = True,
    ) -> None:
        assert config.num_blocks is not None
        one_more = dataclasses.replace(config, num_blocks=config.num_blocks + 1)  # the dummy sequence's
        super().__init__(model, one_more, on_logits, on_step=on_step, keep_history=keep_history)
        self.executor = Executor(model, config, self.cache, use_graphs, keep_logits=on_logits is not None)
        self.retirement: LateRetirement = LateRetirement(self.cache, self.executor.rows)
        self.scheduler = Scheduler(config, self.cache, self.retirement)
        self.depth = 1 if config.async_scheduling else 0
        self.in_flight: deque[InFlight] = deque()

    def check_request(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Raise ``ValueError`` for a request that could never be served."""
        check_prompts(self.model, [prompt], max_new_tokens)
        if len(prompt) + max_new_tokens > (most := self.config.max_model_len or 0):
            raise ValueError(f"{len(prompt) + max_new_tokens} tokens never fit, max_model_len is {most}: ask for fewer")

    def step(self) -> SequenceGroup | None:
        """Task 7.4: plan a step and ``launch`` it; then, if more than ``depth`` are in flight, ``read`` the oldest.

        When nothing can be planned, the oldest is read all the same, because its tokens may change that. Returns what
        ``read`` returned, an empty group if nothing was read, and ``None`` if nothing was planned and nothing was in
        flight: then all requests are done.
        """
        # BEGIN SOLUTION 7.4
        if (group := self.scheduler.schedule()) is not None:
            self.launch(group)
        if self.in_flight and (group is None or len(self.in_flight) > self.depth):
            return self.read(self.in_flight.popleft())
        return None if group is None else SequenceGroup(())
        # END SOLUTION

    def launch(self, group: SequenceGroup) -> None:
        """Start a step and count what it will bring, so that the next can be planned before it is read."""
        is_watched = self.keep_history or self.on_step is not None
        trace = trace_step(self._num_steps, group, self.cache, self.scheduler) if is_watched else None
        self._num_steps += 1
        self.in_flight.append(dataclasses.replace(self.executor.launch(group), trace=trace))
        for entry in group:
            entry.seq.status = SequenceStatus.RUNNING
            entry.seq.num_scheduled = entry.context_len
            entry.seq.num_unread_steps += 1
            entry.seq.num_unread_tokens += entry.samples

    def read(self, step: InFlight) -> SequenceGroup:
        """Wait for a step's tokens and give them out. Returns the group without sequences that had ended before."""
        kept = self.apply(step, step.tokens.wait())
        self.retirement.collect()
        if step.trace is not None:
            trace = step.trace.read(entry.seq.seq_id for entry in kept if entry.seq.is_finished)
            if self.keep_history:
                self.history.append(trace)
            if self.on_step is not None:
                self.on_step(trace)
        return kept

    def apply(self, step: InFlight, tokens: list[int]) -> SequenceGroup:
        """Task 7.4: ``give`` each sequence its token of a step. Returns the group without sequences that had ended before.

        ``tokens``, and ``step.logits`` if there are any, are those of ``step.sampling``, in its order. A sequence that ended
        while the step was in flight gets nothing, because the token is past its end. A sequence that was preempted meanwhile
        gets the token and keeps it. For every entry of the group, take back what :meth:`launch` counted in
        ``num_unread_steps`` and ``num_unread_tokens``: the step is read now. Chunks that sample nothing stay in the group
        that is returned. The group keeps its ``preempted``.
        """
        # BEGIN SOLUTION 7.4
        for entry in step.group:
            entry.seq.num_unread_steps -= 1
            entry.seq.num_unread_tokens -= entry.samples
        kept = tuple(entry for entry in step.group if not entry.seq.is_finished)
        for index, entry in enumerate(step.sampling):
            if not entry.seq.is_finished:
                self.give(entry.seq, tokens[index], None if step.logits is None else step.logits[index])
        return SequenceGroup(kept, step.group.preempted)
        # END SOLUTION

    def give(self, seq: data.Sequence, token_id: int, scores: Tensor | None) -> None:
        """Append a sequence's token, and see whether the sequence ends with it."""
        if self.on_logits is not None and scores is not None:
            self.on_logits(seq.seq_id, scores)
        seq.token_ids.append(token_id)
        if token_id == self.model.config.eos_token_id or len(seq.token_ids) == seq.max_num_tokens:
            self.finish(seq)

    def finish(self, seq: data.Sequence) -> None:
        """End a sequence, because it is done or was aborted. Its blocks come back late."""
        self.scheduler.finish(seq)
        self.retirement.retire(seq)
        seq.status = SequenceStatus.FINISHED


def generate(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_logits: OnLogits | None = None,
    *,
    config: PageBrainConfig | None = None,
    on_step: Observer | None = None,
    use_graphs: bool = True,
) -> list[list[int]]:
    """The greedy continuation of each prompt; without a ``config``, launched ahead and with :func:`half_the_room`."""
    check_prompts(model, prompts, max_new_tokens)
    if config is None:
        # Block tables, and what is gathered through them, are as wide as the longest text needs.
        longest = max(map(len, prompts), default=1) + max_new_tokens
        config = half_the_room(model, prompts, max_new_tokens)
        config = dataclasses.replace(config, async_scheduling=True, max_model_len=longest)
    engine = Engine(model, config, on_logits, on_step=on_step, use_graphs=use_graphs)
    sequences = [engine.add_request(prompt, max_new_tokens) for prompt in prompts]
    while engine.step() is not None:
        pass
    return [seq.output_token_ids for seq in sequences]


def answer_7_6() -> tuple[float, str]:
    """Task 7.6: how long is the gap that the host makes between two steps, and which work of the host fills it?

    The number, in microseconds: in ``docs/performance/timeline.json``, take the run of batch 1 whose ``way`` is ``graph``
    (a graph, and nothing launched ahead). For each step start but the first, take the time from the end of the last kernel
    that began before it to the beginning of the first kernel after it. The number is the median of these gaps. Their data is
    in ``run["timeline"]``: ``step_starts_us``, and ``gpu``, a list of ``[begin, end]`` in microseconds. An entry of ``gpu``
    is a stretch of time in which the GPU was busy: kernels with less than a microsecond between them are one entry. Measure
    in a cell of the notebook, and return the number that you found, written as a number.

    The text, one to four sentences and at least 8 different words, goes to your instructor: what does the host do in this
    gap (``host`` in the timeline has its parts), and why does the run ``ahead`` not have it?
    """
    # BEGIN SOLUTION 7.6
    text = (
        "In the gap the host copies and reads the sampled tokens, gives them out, schedules the next step, "
        "prepares it and starts "
        "to launch the graph; the GPU has nothing to do until the first kernel arrives. Launched ahead, the "
        "next graph is in the "
        "GPU's queue before the last step ends, so the same work of the host happens while the GPU computes."
    )
    return 497.1, text
    # END SOLUTION


# When your tasks are done, compare them with the engine: pagebrain.worker.batch_rows, pagebrain.worker.graphs,
# pagebrain.worker.cuda_executor, CacheManager.collect in pagebrain.cache and Engine.step in pagebrain.engine.engine.
# In vLLM: vllm/v1/worker/gpu_model_runner.py, vllm/compilation/cuda_graph.py and AsyncScheduler.
