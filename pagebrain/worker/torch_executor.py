"""Runs steps with torch operations, on every device.

A plan becomes tensors, the model computes logits, and the sampler chooses tokens. In the order of a step:
:meth:`TorchExecutor.launch`, ``_prepare``, ``_run``, ``_sample``, ``_results``.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pagebrain.attention import ForwardBatch
from pagebrain.attention.kv_pool import KVPool
from pagebrain.config import PageBrainConfig
from pagebrain.engine.executor import InFlight, StepResult
from pagebrain.engine.parts import SamplerPart
from pagebrain.engine.sequence import ScheduledSequence, SequenceGroup
from pagebrain.errors import ConfigError, StepError
from pagebrain.models.model import Model
from pagebrain.outputs import TokenLogprobs
from pagebrain.sampling import SamplerOutput, SampleRow
from pagebrain.sampling.logprobs import prompt_logprobs, score_prompt
from pagebrain.worker.token_rows import TokenRows


@dataclass(frozen=True)
class PromptScores:
    """The logits of a step that give a sequence's prompt log-probabilities."""

    entry: int
    flat_rows: range
    row: int
    first_position: int
    num_top: int


@dataclass(frozen=True)
class _Step:
    """A step as tensors, without its token ids. They are read from the rows when it runs: the step before may write them.

    ``sampling`` holds the index and the row of each scheduled sequence that samples.
    """

    group: SequenceGroup
    token_rows: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    make_batch: Callable[..., ForwardBatch]
    sampling: list[tuple[int, int]]
    prompt_scores: list[PromptScores]


class TorchExecutor:
    """Runs steps with torch on the model's device, one after the other.

    With ``async_scheduling`` a thread computes the step, while the engine plans and detokenizes. Without it, ``wait``
    computes the step.
    """

    def __init__(self, model: Model, pool: KVPool, sampler: SamplerPart, config: PageBrainConfig) -> None:
        if config.max_model_len is None:
            raise ConfigError("max_model_len is not set: make the config with PageBrainConfig.for_model(base, ...)")
        self.model = model
        self.pool = pool
        self.sampler = sampler
        self.config = config
        self.rows = TokenRows(config.max_num_seqs, config.max_model_len, config.block_size, config.device)
        self._thread = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="pagebrain-step") if config.async_scheduling else None
        )

    def launch(self, group: SequenceGroup) -> InFlight:
        """Start to compute a step. ``wait`` raises the errors of the computation."""
        prepared = self._prepare(group)
        if self._thread is not None:
            return InFlight(group, self._thread.submit(self._run, prepared).result)
        return InFlight(group, lambda: self._run(prepared))

    def _prepare(self, group: SequenceGroup) -> _Step:
        """Apply the plan's changes, and make all tensors that do not depend on token values."""
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
        places = torch.tensor(positions).to(device)
        make_batch = partial(
            ForwardBatch,
            positions=places,
            slot_mapping=torch.tensor(slots).to(device),
            block_tables=tables.padded(entry.seq.seq_id for entry in group).to(device),
            context_lens=torch.tensor([entry.context_len for entry in group]).to(device),
            query_starts=query_starts.to(device),
            logits_rows=torch.tensor(logits_rows, dtype=torch.int64).to(device),
            num_decodes=sum(entry.num_tokens == 1 for entry in group),
        )
        token_rows = torch.tensor(rows).repeat_interleave(lengths).to(device)
        return _Step(group, token_rows, places, make_batch, sampling, scores)

    @torch.no_grad()
    def _run(self, step: _Step) -> StepResult:
        self.pool.apply(step.group.swapped_out, step.group.swapped_in, step.group.copied_blocks)
        batch = step.make_batch(token_ids=self.rows.token_ids[step.token_rows, step.positions])
        logits = self.model.forward_tokens(batch)
        sampled = self._sample(logits[: len(step.sampling)], step) if step.sampling else None
        return self._results(step, logits, sampled)

    def _sample(self, logits: Tensor, step: _Step) -> SamplerOutput:
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

    def _results(self, step: _Step, logits: Tensor, sampled: SamplerOutput | None) -> StepResult:
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
    """Raise ``StepError`` unless all tokens are in the vocabulary: the sampler may be a part that the user wrote."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise StepError(f"the sampler chose token {wrong}, but ids run from 0 to {vocab_size - 1}")


def prompt_scores(entry: ScheduledSequence, index: int, row: int, first_flat_row: int) -> PromptScores | None:
    """The logits rows that score prompt tokens in this step: position ``p`` scores token ``p + 1``."""
    num_top = entry.seq.params.prompt_logprobs
    num_scoring = min(entry.context_len, entry.seq.num_prompt_tokens - 1) - entry.start
    if num_top is None or num_scoring <= 0 or entry.seq.sample_index > 0:
        return None
    return PromptScores(index, range(first_flat_row, first_flat_row + num_scoring), row, entry.start + 1, num_top)
