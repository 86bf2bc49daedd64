"""Turns a planned step into tensors, runs the model and the sampler, and hands the tokens over when asked for them.

``launch`` returns at once with an :class:`InFlight`, and ``InFlight.wait`` brings the tokens. Between the two the engine
may launch another step (depth 1). That step's newest input tokens are not known to the engine yet, so every sequence has a
*batch row* here that holds its tokens, and a sampled token is written to it where the next step reads it.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from pagebrain.attention import ForwardBatch
from pagebrain.attention.kv_pool import KVPool
from pagebrain.cache import BlockTables
from pagebrain.config import PageBrainConfig
from pagebrain.engine.parts import SamplerPart
from pagebrain.engine.sequence import ScheduledSequence, Sequence, SequenceGroup
from pagebrain.errors import ConfigError, StepError
from pagebrain.outputs import TokenLogprobs
from pagebrain.sampling import SamplerOutput, SampleRow
from pagebrain.sampling.logprobs import prompt_logprobs, score_prompt


@dataclass(frozen=True)
class StepResult:
    """What a step brought.

    Attributes:
        token_ids: for each scheduled sequence its next tokens: none where the step did not sample, otherwise one or more.
        logprobs: index of the scheduled sequence -> log-probabilities at each of these tokens, where they were asked for.
        prompt_logprobs: index of the scheduled sequence -> ``(first position, log-probabilities of the prompt tokens there
            and after)``, where they were asked for.
    """

    token_ids: SequenceOf[tuple[int, ...]]
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, tuple[int, tuple[TokenLogprobs, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class InFlight:
    """A step that was launched. ``wait`` brings its results, or raises what the step raised.

    ``num_graph_decodes`` of its sequences were computed by replaying a CUDA graph.
    """

    group: SequenceGroup
    wait: Callable[[], StepResult]
    num_graph_decodes: int = 0


class Executor(Protocol):
    """What the engine calls."""

    def launch(self, group: SequenceGroup) -> InFlight:
        """Apply what the plan changes, and start computing its step."""
        ...


class TokenRows:
    """A row of tokens and a block table for every sequence at work. A step finds there what the step before it sampled.

    Attributes:
        token_ids: int64 ``[num_rows, max_model_len + 1]``; the last place is written, never read.
        tables: as the plans have told them.
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int, device: str) -> None:
        self.num_rows = num_rows
        self.token_ids = torch.zeros(num_rows, max_model_len + 1, dtype=torch.int64, device=device)
        self.tables = BlockTables(block_size)
        self._free = list(range(num_rows))
        self._row_of: dict[int, int] = {}

    def apply(self, group: SequenceGroup) -> None:
        """Make the changes that a plan carries: rows that come back, blocks that were added."""
        self.tables.apply(group)
        for seq_id in group.released:
            if seq_id in self._row_of:
                self._free.append(self._row_of.pop(seq_id))

    def row_of(self, seq: Sequence) -> int:
        """The sequence's row; a new one is filled with the tokens known so far."""
        row = self._row_of.get(seq.seq_id)
        if row is None:
            row = self._row_of[seq.seq_id] = self._free.pop()
            self.token_ids[row, : len(seq.token_ids)] = torch.tensor(seq.token_ids)
        return row


@dataclass(frozen=True)
class PromptScores:
    """Which logits of a step are wanted for a sequence's prompt log-probabilities."""

    entry: int
    flat_rows: range
    row: int
    first_position: int
    num_top: int


@dataclass(frozen=True)
class _Prepared:
    """A step as tensors. Its token ids are read from the batch rows when it runs: the step before may still write them."""

    group: SequenceGroup
    batch_rows: Tensor  # int64 [num_tokens]
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    logits_rows: Tensor
    sampling: list[tuple[int, int]]  # (index of the scheduled sequence, its batch row)
    prompt_scores: list[PromptScores]
    num_decodes: int


class TorchExecutor:
    """Runs steps with torch on the model's device, one after the other.

    With ``async_scheduling`` a thread of its own does the work, so that the engine plans and detokenizes meanwhile. Without,
    the work is done when it is waited for.
    """

    def __init__(self, model: nn.Module, pool: KVPool, sampler: SamplerPart, config: PageBrainConfig) -> None:
        if config.max_model_len is None:
            raise ConfigError("max_model_len is not set: make the config with PageBrainConfig.for_model(base, ...)")
        self.model = model
        self.pool = pool
        self.sampler = sampler
        self.config = config
        # Twice the seats: one that ended keeps its row until the last step with it was read, while another takes its seat.
        self.rows = TokenRows(2 * config.max_num_seqs, config.max_model_len, config.block_size, config.device)
        self._worker = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="pagebrain-step") if config.async_scheduling else None
        )

    def launch(self, group: SequenceGroup) -> InFlight:
        """Start computing a step; errors of the computation itself surface in ``wait``."""
        prepared = self._prepare(group)
        if self._worker is not None:
            return InFlight(group, self._worker.submit(self._run, prepared).result)
        return InFlight(group, lambda: self._run(prepared))

    def _prepare(self, group: SequenceGroup) -> _Prepared:
        """Apply the plan's changes, and make tensors of everything in it that does not depend on token values."""
        self.rows.apply(group)
        tables = self.rows.tables
        rows = [self.rows.row_of(entry.seq) for entry in group]
        lengths = torch.tensor([entry.num_tokens for entry in group])
        query_starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        starts = query_starts.tolist()
        sampling = [(index, rows[index]) for index, entry in enumerate(group) if entry.samples]
        scores = [
            wanted
            for index, entry in enumerate(group)
            if (wanted := prompt_scores(entry, index, rows[index], starts[index])) is not None
        ]
        logits_rows = [starts[index + 1] - 1 for index, _ in sampling]
        for wanted in scores:
            logits_rows.extend(wanted.flat_rows)
        slots: list[int] = []
        positions: list[int] = []
        for entry in group:
            slots.extend(tables.slots(entry.seq.seq_id, entry.start, entry.num_tokens))
            positions.extend(range(entry.start, entry.context_len))
        device = self.config.device
        return _Prepared(
            group=group,
            batch_rows=torch.tensor(rows).repeat_interleave(lengths).to(device),
            positions=torch.tensor(positions).to(device),
            slot_mapping=torch.tensor(slots).to(device),
            block_tables=tables.padded(entry.seq.seq_id for entry in group).to(device),
            context_lens=torch.tensor([entry.context_len for entry in group]).to(device),
            query_starts=query_starts.to(device),
            logits_rows=torch.tensor(logits_rows, dtype=torch.int64).to(device),
            sampling=sampling,
            prompt_scores=scores,
            num_decodes=sum(entry.num_tokens == 1 for entry in group),
        )

    @torch.no_grad()
    def _run(self, step: _Prepared) -> StepResult:
        self.pool.copy_blocks(step.group.copied_blocks)
        batch = ForwardBatch(
            token_ids=self.rows.token_ids[step.batch_rows, step.positions],
            positions=step.positions,
            slot_mapping=step.slot_mapping,
            block_tables=step.block_tables,
            context_lens=step.context_lens,
            query_starts=step.query_starts,
            logits_rows=step.logits_rows,
            num_decodes=step.num_decodes,
        )
        logits: Tensor = self.model.forward_tokens(batch)  # type: ignore[operator]
        sampled = self._sample(logits[: len(step.sampling)], step) if step.sampling else None
        return self._results(step, logits, sampled)

    def _sample(self, logits: Tensor, step: _Prepared) -> SamplerOutput:
        entries = [(step.group.scheduled[index], row) for index, row in step.sampling]
        sample_rows = [
            SampleRow(
                params=entry.seq.params,
                seed=entry.seq.request.seed,
                sample_index=entry.seq.sample_index,
                output_position=entry.context_len - entry.seq.num_prompt_tokens,
                history=self.rows.token_ids[row, : entry.context_len],
                num_prompt_tokens=entry.seq.num_prompt_tokens,
            )
            for entry, row in entries
        ]
        sampled = self.sampler.sample(logits, sample_rows)
        if sampled.token_ids.shape != (len(entries),):
            raise StepError(f"the sampler was given {len(entries)} rows and returned {list(sampled.token_ids.shape)} tokens")
        rows = torch.tensor([row for _, row in entries], device=logits.device)
        positions = torch.tensor([entry.context_len for entry, _ in entries], device=logits.device)
        self.rows.token_ids[rows, positions] = sampled.token_ids
        return sampled

    def _results(self, step: _Prepared, logits: Tensor, sampled: SamplerOutput | None) -> StepResult:
        tokens: list[tuple[int, ...]] = [()] * len(step.group)
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        if sampled is not None:
            token_ids = sampled.token_ids.tolist()
            check_sampled(token_ids, self.config.vocab_size or 0)
            scores = sampled.logprobs.to_list() if sampled.logprobs is not None else [None] * len(token_ids)
            for (index, _), token_id, entry_scores in zip(step.sampling, token_ids, scores, strict=True):
                tokens[index] = (token_id,)
                if entry_scores is not None:
                    logprobs[index] = (entry_scores,)
        of_prompts: dict[int, tuple[int, tuple[TokenLogprobs, ...]]] = {}
        offset = len(step.sampling)
        for wanted in step.prompt_scores:
            count = len(wanted.flat_rows)
            targets = self.rows.token_ids[wanted.row, wanted.first_position : wanted.first_position + count]
            scored = score_prompt(logits[offset : offset + count], targets, wanted.num_top)
            of_prompts[wanted.entry] = wanted.first_position, tuple(prompt_logprobs(scored))
            offset += count
        return StepResult(tokens, logprobs, of_prompts)


def check_sampled(token_ids: list[int], vocab_size: int) -> None:
    """Raise ``StepError`` unless all tokens are in the vocabulary: a sampler may be somebody's own."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise StepError(f"the sampler chose token {wrong}, but ids run from 0 to {vocab_size}")


def prompt_scores(entry: ScheduledSequence, index: int, row: int, first_flat_row: int) -> PromptScores | None:
    """The logits rows that score prompt tokens in this step: position ``p`` scores token ``p + 1``."""
    num_top = entry.seq.params.prompt_logprobs
    num_scoring = min(entry.context_len, entry.seq.num_prompt_tokens - 1) - entry.start
    if num_top is None or num_scoring <= 0 or entry.seq.sample_index > 0:
        return None
    return PromptScores(index, range(first_flat_row, first_flat_row + num_scoring), row, entry.start + 1, num_top)
