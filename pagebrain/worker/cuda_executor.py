"""Computes steps on a GPU: one CUDA graph for the decodes of a step, another one for small numbers of prompt tokens.

``launch`` puts a step into the GPU's queue and returns without waiting. The sampled tokens stay on the device, in the batch
rows, so the engine may launch the next step before it has read this one.

Other work is launched kernel by kernel. Large numbers of prompt tokens keep the GPU busy for longer than the launches take.
Requests with penalties, logit bias, ``min_tokens`` not reached yet or log-probabilities need more than the sampling kernels
do: they go through the :class:`~pagebrain.sampling.Sampler`, which is slower.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagebrain.attention import ForwardBatch
from pagebrain.attention.kv_pool import KVPool
from pagebrain.config import PageBrainConfig
from pagebrain.devices import on_device
from pagebrain.engine.executor import InFlight, StepResult
from pagebrain.engine.parts import SamplerPart
from pagebrain.engine.sequence import ScheduledSequence, Sequence, SequenceGroup
from pagebrain.kernels.sample import sample, sample_greedy
from pagebrain.models.model import Model
from pagebrain.outputs import TokenLogprobs
from pagebrain.sampling import SamplerOutput
from pagebrain.sampling.logprobs import LogprobsTensors, prompt_logprobs, score_prompt
from pagebrain.worker.batch_rows import BatchRow, BatchRows, IntArray, send_together, to_device
from pagebrain.worker.graphs import ChunkGraphs, ChunkInput, DecodeGraphs, Recorder
from pagebrain.worker.torch_executor import PromptScores, check_sampled, prompt_scores


@dataclass(frozen=True)
class _Chunk:
    """A scheduled sequence that is no plain decode: a part of a prompt, or a decode that needs the sampler."""

    index: int
    entry: ScheduledSequence
    row: BatchRow

    @property
    def is_plain(self) -> bool:
        return self.entry.context_len >= self.row.plain_from


@dataclass(frozen=True)
class _Sorted:
    """A step in two parts: ``decodes`` with their ``rows``, and ``chunks``.

    The last token of a prompt is computed like a decode if it is alone in its chunk; ``num_decodes`` does not count it.
    """

    seqs: tuple[Sequence, ...]
    decodes: list[int]  # indices of scheduled sequences
    rows: list[int]
    sampled: bool  # some row is not greedy
    chunks: list[_Chunk]
    num_decodes: int


@dataclass(frozen=True)
class _ChunkOutput:
    """The results of chunks, on the device. The kernels sampled for ``plain`` chunks, the sampler for ``special`` ones."""

    plain: list[_Chunk]
    special: list[_Chunk]
    token_ids: Tensor  # int32 [len(plain) + len(special)]
    sampled: SamplerOutput | None  # of ``special``
    scores: list[tuple[PromptScores, list[LogprobsTensors]]]


class CudaExecutor:
    """Runs steps on the GPU, in the order in which they are launched.

    Args:
        model: its attention uses the Triton kernels.
        pool: the model's K and V.
        sampler: samples where the sampling kernels cannot.
        config: resolved.
    """

    def __init__(self, model: Model, pool: KVPool, sampler: SamplerPart, config: PageBrainConfig) -> None:
        self.model = model
        self.sampler = sampler
        self.vocab_size = config.vocab_size or 0
        self.pool = pool
        self.rows = BatchRows(pool.dummy_block, config)
        self.decodes = DecodeGraphs(self._decode, self.rows, config.max_num_seqs)
        self.chunks = ChunkGraphs(self._compute_chunks, self.rows, config.max_num_batched_tokens)
        self._query_starts = torch.arange(config.max_num_seqs + 1, dtype=torch.int32, device=self.rows.device)
        self._last: _Sorted | None = None  # the last step, if it had only decodes and no row was freed since
        self.capture_s: float | None = None
        self.warm_up(with_decodes=not config.cuda_graphs)
        if config.cuda_graphs:
            self.capture()

    @torch.inference_mode()
    def warm_up(self, with_decodes: bool) -> None:
        """Compute chunks of every kind once, and decodes if asked, so that no request waits for a compiler.

        All tokens are on the dummy row. Outputs are discarded; only the dummy block is written.
        """
        dummy = self.rows.dummy_row
        self.rows.set_context_len(dummy, 2)  # the longest query below has two tokens
        with on_device(self.rows.device):
            self.rows.upload()
            # Decodes, and a prompt beside decodes. The number of sequences decides into how many splits contexts are cut.
            for lengths in [lengths for size in self.decodes.sizes for lengths in ([1] * size, [2] + [1] * (size - 1))]:
                places = np.zeros(sum(lengths), dtype=np.int64)
                logits_rows = np.cumsum(lengths) - 1
                batch = self._send_batch(np.full(len(lengths), dummy), np.array(lengths), places, logits_rows)
                logits = self.model.forward_tokens(batch)
                rows = to_device(np.full(len(lengths), dummy), logits.device).int()
                for sampled in (False, True):
                    self._choose(logits, rows, torch.empty_like(rows), sampled)
            self.rows.set_context_len(dummy, 1)
            self.rows.upload()
            if with_decodes:
                self.decodes.warm_up()

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the graphs, on the dummy row. ``capture_s`` is the time it took."""
        began = time.monotonic()
        with on_device(self.rows.device):
            self.rows.upload()
            recorder = Recorder(self.rows.device)
            self.chunks.capture(recorder)
            self.decodes.capture(recorder)
            torch.cuda.synchronize(self.rows.device)
        self.capture_s = time.monotonic() - began

    @torch.inference_mode()
    def launch(self, group: SequenceGroup) -> InFlight:
        """Put a step into the GPU's queue."""
        self.rows.apply(group)
        if group.released:
            self._last = None
        step = self._sort(group)
        indices, output = step.decodes, None
        with on_device(self.rows.device):
            self.rows.upload()
            self.pool.apply(group.swapped_out, group.swapped_in, group.copied_blocks)
            tokens = [self.decodes.run(step.rows, step.sampled)] if step.rows else []
            if step.chunks:
                output = self._run_chunks(step.chunks)
                tokens.append(output.token_ids)
                indices = indices + [chunk.index for chunk in (*output.plain, *output.special)]
            read = to_host(tokens)
        num_graph_decodes = step.num_decodes if self.decodes.is_captured else 0
        return InFlight(group, lambda: self._result(group, indices, read(), output), num_graph_decodes)

    def _sort(self, group: SequenceGroup) -> _Sorted:
        seqs, _, lengths, samples = zip(*group.scheduled)
        if self._last is not None and seqs == self._last.seqs and lengths.count(1) == len(seqs) and all(samples):
            return self._last  # fast path: same sequences as in the last step
        step = _Sorted(seqs, [], [], False, [], 0)
        for index, entry in enumerate(group.scheduled):
            row = self.rows.row_of(entry)
            if entry.num_tokens == 1 and entry.samples and entry.context_len >= row.plain_from:
                step.decodes.append(index)
                step.rows.append(row.index)
            else:
                step.chunks.append(_Chunk(index, entry, row))
                self.rows.set_context_len(row.index, entry.context_len)
        sampled = any(not self.rows.row_of(group.scheduled[index]).is_greedy for index in step.decodes)
        num_decodes = sum(group.scheduled[index].phase == "decode" for index in step.decodes)
        step = dataclasses.replace(step, sampled=sampled, num_decodes=num_decodes)
        self._last = None if step.chunks else dataclasses.replace(step, num_decodes=len(step.decodes))
        return step

    def _decode(self, active_rows: Tensor, out: Tensor, sampled: bool) -> None:
        """A decode step from embedding to sampled token. A graph records it."""
        num_seqs = active_rows.shape[0]
        batch = self.rows.decode_batch(active_rows, self._query_starts[: num_seqs + 1])
        self._choose(self.model.forward_tokens(batch), active_rows, out, sampled)

    def _choose(self, logits: Tensor, active_rows: Tensor, out: Tensor, sampled: bool) -> None:
        """Sample the next token of each row into ``out`` and into the batch rows, where the next step reads it."""
        rows = self.rows
        inputs = (logits, self.vocab_size, active_rows, rows.context_lens, rows.token_ids, out)
        if sampled:
            sample(*inputs, rows.sampling)
        else:
            sample_greedy(*inputs)

    def _compute_chunks(self, chunks: ChunkInput, out: Tensor) -> None:
        """A step of chunks, with the next tokens of those that sample. A graph records it, for any number of decodes."""
        token_rows, positions, active_rows, logits_rows, sampled_rows, query_starts = chunks
        batch = self.rows.chunk_batch(token_rows, positions, active_rows, query_starts, logits_rows, num_decodes=None)
        self._choose(self.model.forward_tokens(batch), sampled_rows.int(), out, sampled=True)

    def _run_chunks(self, chunks: list[_Chunk]) -> _ChunkOutput:
        sampling = [chunk for chunk in chunks if chunk.entry.samples]
        plain = [chunk for chunk in sampling if chunk.is_plain]
        special = [chunk for chunk in sampling if not chunk.is_plain]
        if self._fits_graph(chunks) and not special:
            return _ChunkOutput(plain, [], self._replay_chunks(chunks, plain), None, [])
        batch, scores = self._chunk_batch(chunks, plain + special)
        logits = self.model.forward_tokens(batch)
        token_ids = torch.empty(len(sampling), dtype=torch.int32, device=logits.device)
        if plain:
            rows = to_device(np.array([chunk.row.index for chunk in plain]), logits.device).int()
            sampled = any(not chunk.row.is_greedy for chunk in plain)
            self._choose(logits[: len(plain)], rows, token_ids[: len(plain)], sampled)
        of_tokens = logits[:, : self.vocab_size]
        output = self._sample(of_tokens[len(plain) : len(sampling)], special) if special else None
        if output is not None:
            token_ids[len(plain) :] = output.token_ids
        first, wanted = len(sampling), []
        for score in scores:
            count = len(score.flat_rows)
            targets = self.rows.token_ids[score.row, score.first_position : score.first_position + count].long()
            wanted.append((score, score_prompt(of_tokens[first : first + count], targets, score.num_top)))
            first += count
        return _ChunkOutput(plain, special, token_ids, output, wanted)

    def _fits_graph(self, chunks: list[_Chunk]) -> bool:
        if not self.chunks.is_captured or any(chunk.entry.seq.params.prompt_logprobs is not None for chunk in chunks):
            return False
        return self.chunks.has_room_for(len(chunks), sum(chunk.entry.num_tokens for chunk in chunks))

    def _replay_chunks(self, chunks: list[_Chunk], sampling: list[_Chunk]) -> Tensor:
        """Compute the chunks with a graph. Returns the tokens of ``sampling``."""
        row_numbers, lengths, positions = _flat(chunks)
        sampled_rows = np.array([chunk.row.index for chunk in sampling], dtype=np.int64)
        return self.chunks.run(row_numbers, lengths, positions, _last_rows(chunks, sampling), sampled_rows)

    def _chunk_batch(self, chunks: list[_Chunk], sampling: list[_Chunk]) -> tuple[ForwardBatch, list[PromptScores]]:
        """The chunks as one flat batch. Its logits are those for ``sampling``, then those for the prompt scores."""
        row_numbers, lengths, positions = _flat(chunks)
        logits_rows = _last_rows(chunks, sampling).tolist()
        scores = []
        for chunk, end in zip(chunks, lengths.cumsum().tolist()):
            score = prompt_scores(chunk.entry, chunk.index, chunk.row.index, end - chunk.entry.num_tokens)
            if score is not None:
                scores.append(score)
                logits_rows.extend(score.flat_rows)
        return self._send_batch(row_numbers, lengths, positions, np.array(logits_rows, dtype=np.int64)), scores

    def _send_batch(
        self, row_numbers: IntArray, lengths: IntArray, positions: IntArray, logits_rows: IntArray
    ) -> ForwardBatch:
        """A batch on the device: ``lengths[i]`` tokens of row ``row_numbers[i]``, and the ``positions`` of all tokens."""
        starts = np.concatenate(([0], lengths.cumsum()))
        pieces = (row_numbers.repeat(lengths), positions, row_numbers, starts, logits_rows)
        token_rows, places, active_rows, query_starts, wanted = send_together(pieces, self.rows.device)
        num_decodes = int((lengths == 1).sum())
        return self.rows.chunk_batch(token_rows, places, active_rows, query_starts, wanted, num_decodes)

    def _sample(self, logits: Tensor, chunks: list[_Chunk]) -> SamplerOutput:
        sample_rows = [self.rows.sample_row(chunk.entry.seq, chunk.row, chunk.entry.context_len) for chunk in chunks]
        output = self.sampler.sample(logits, sample_rows)
        places = np.array([(chunk.row.index, chunk.entry.context_len, index) for index, chunk in enumerate(chunks)])
        places = places[places[:, 1] < self.rows.token_ids.shape[1]]  # no step reads a token after a full context
        rows, positions, indices = to_device(places.T.copy(), logits.device)
        self.rows.token_ids[rows, positions] = output.token_ids[indices].int()
        return output

    def _result(
        self, group: SequenceGroup, indices: list[int], token_ids: list[int], output: _ChunkOutput | None
    ) -> StepResult:
        check_sampled(token_ids, self.vocab_size)
        if output is None:
            return StepResult(list(zip(token_ids)))  # without chunks there is one token for every sequence
        tokens: list[tuple[int, ...]] = [()] * len(group)
        for index, token_id in zip(indices, token_ids, strict=True):
            tokens[index] = (token_id,)
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        if output.sampled is not None and output.sampled.logprobs is not None:
            found = zip(output.special, output.sampled.logprobs.to_list(), strict=True)
            logprobs = {chunk.index: (scores,) for chunk, scores in found if scores is not None}
        of_prompts = {
            wanted.entry: (wanted.first_position, tuple(prompt_logprobs(scored))) for wanted, scored in output.scores
        }
        return StepResult(tokens, logprobs, of_prompts)


def _flat(chunks: list[_Chunk]) -> tuple[IntArray, IntArray, IntArray]:
    """Row numbers and lengths ``[num_chunks]``, and the positions of all tokens ``[num_tokens]``."""
    row_numbers = np.array([chunk.row.index for chunk in chunks])
    lengths = np.array([chunk.entry.num_tokens for chunk in chunks])
    return row_numbers, lengths, np.concatenate([np.arange(chunk.entry.start, chunk.entry.context_len) for chunk in chunks])


def _last_rows(chunks: list[_Chunk], sampling: list[_Chunk]) -> IntArray:
    """Index of the last token of each chunk in ``sampling`` in the flat batch of ``chunks``."""
    ends = np.array([chunk.entry.num_tokens for chunk in chunks]).cumsum().tolist()
    end_of = {chunk.index: end for chunk, end in zip(chunks, ends)}
    return np.array([end_of[chunk.index] - 1 for chunk in sampling], dtype=np.int64)


def to_host(tensors: list[Tensor]) -> Callable[[], list[int]]:
    """Start to copy integers to the host. Returns a function that waits for the copy and returns all of them in one list."""
    if not tensors:
        return list
    device = tensors[0].device
    if device.type != "cuda":
        copies = [tensor.tolist() for tensor in tensors]
        return lambda: [number for copy in copies for number in copy]
    pinned = torch.empty(sum(map(len, tensors)), dtype=tensors[0].dtype, pin_memory=True)
    first = 0
    for tensor in tensors:
        pinned[first : first + len(tensor)].copy_(tensor, non_blocking=True)
        first += len(tensor)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def read() -> list[int]:
        arrived.synchronize()
        numbers: list[int] = pinned.tolist()
        return numbers

    return read
