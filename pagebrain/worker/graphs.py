"""CUDA graphs: a step is recorded once for each of a few sizes, and later launched as one.

A step of GPT-2 small is some hundred kernels of a few microseconds each. Launching them one by one takes the host longer
than computing them takes the GPU. A graph keeps the launches with their addresses. So the input and output of a step are in
buffers that never move: one holds the numbers of the active batch rows, another the sampled tokens. All other state is in
the batch rows, where the graph reads and changes it. A batch that is smaller than the size of its graph is padded with the
dummy row.

:class:`DecodeGraphs` have sizes in sequences, each with one token. :class:`ChunkGraphs` have sizes in tokens, of a few
prompts or chunks of prompts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pagebrain.worker.batch_rows import BatchRows, IntArray, to_device


class Recorder:
    """Records graphs that share their memory. So two of them must never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def record(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record what ``compute`` launches. It runs once before, to compile kernels and to let cuBLAS choose its own."""
        with torch.cuda.stream(self._stream):
            compute()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            compute()
        return graph


DecodeStep = Callable[[Tensor, Tensor, bool], None]
"""``(active_rows, out, sampled)``: compute the next token of each active row, greedy or by its sampling parameters."""


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes that graphs are recorded for, up to ``max_num_seqs``.

    They double up to 64, and then grow by a half at most. Padding costs little, because it attends to one token. Each graph
    costs milliseconds at every start.
    """
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size = 2 * size if size < 64 else size + max(32, size // 4 // 32 * 32)
    return (*sizes, max_num_seqs)


class DecodeGraphs:
    """Runs decode steps of up to ``max_num_seqs`` rows.

    Without :meth:`capture` each step is launched kernel by kernel, with the same buffers and the same padding.

    Attributes:
        active_rows: int32 ``[max_num_seqs]``, the input.
        token_ids: int32 ``[max_num_seqs]``, the output.
    """

    def __init__(self, step: DecodeStep, rows: BatchRows, max_num_seqs: int) -> None:
        self.step = step
        self.sizes = bucket_sizes(max_num_seqs)
        self.device = rows.device
        self.dummy_row = rows.dummy_row
        self.active_rows = torch.full((max_num_seqs,), rows.dummy_row, dtype=torch.int32, device=rows.device)
        self.token_ids = torch.zeros(max_num_seqs, dtype=torch.int32, device=rows.device)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._uploaded: list[int] = []

    def warm_up(self) -> None:
        """Compute a step of each size on the dummy row, so that no request waits for a compiler."""
        for size in self.sizes:
            for sampled in (False, True):
                self._compute(size, sampled)

    def capture(self, recorder: "Recorder") -> None:
        """Record a greedy and a sampled graph for each size; the rows must have been uploaded."""
        for size in reversed(self.sizes):  # the largest first: its memory is enough for the others
            for sampled in (False, True):
                self._graphs[size, sampled] = recorder.record(partial(self._compute, size, sampled))

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed."""
        return bool(self._graphs)

    def run(self, rows: list[int], sampled: bool) -> Tensor:
        """Compute the next token of each row. Returns the tokens, a view that the next step overwrites."""
        size = next(size for size in self.sizes if size >= len(rows))
        self._upload(rows + [self.dummy_row] * (size - len(rows)))
        graph = self._graphs.get((size, sampled))
        if graph is None:
            self._compute(size, sampled)
        else:
            graph.replay()
        return self.token_ids[: len(rows)]

    def _upload(self, rows: list[int]) -> None:
        if rows != self._uploaded:
            self.active_rows[: len(rows)].copy_(to_device(np.array(rows, dtype=np.int64), self.device))
            self._uploaded = rows

    def _compute(self, size: int, sampled: bool) -> None:
        self.step(self.active_rows[:size], self.token_ids[:size], sampled)


class ChunkInput(NamedTuple):
    """Prompts or chunks of prompts as one flat batch, int64 on the device; see :meth:`BatchRows.chunk_batch`.

    The logits of token ``logits_rows[i]`` give the next token of batch row ``sampled_rows[i]``.
    """

    token_rows: Tensor
    positions: Tensor
    active_rows: Tensor
    logits_rows: Tensor
    sampled_rows: Tensor
    query_starts: Tensor


ChunkStep = Callable[[ChunkInput, Tensor], None]
"""``(chunks, out)``: compute the chunks, and write the next tokens of ``sampled_rows`` to ``out``."""

MAX_CHUNKS = 16
"""Chunks in a graph at most. A step that is small enough for a graph seldom has more."""


def chunk_sizes(max_num_tokens: int) -> tuple[int, ...]:
    """The numbers of tokens that graphs are recorded for.

    A larger step keeps the GPU busy for longer than the host takes to launch it. A smaller step is faster with a graph,
    although all of its padding is computed.
    """
    sizes = (64, 128, 256, 512, 1024, 2048)
    return tuple(size for size in sizes if size <= max_num_tokens) or (max_num_tokens + max_num_tokens % 2,)


class ChunkGraphs:
    """Computes up to ``MAX_CHUNKS`` chunks of prompts in a step, and the next tokens of those that sample.

    One copy fills the buffer of the step's size with all inputs. Padding is tokens of the dummy row that belong to no
    sequence, and sequences without tokens.

    Attributes:
        token_ids: int32 ``[MAX_CHUNKS]``, the output.
    """

    def __init__(self, step: ChunkStep, rows: BatchRows, max_num_tokens: int) -> None:
        self.step = step
        self.sizes = chunk_sizes(max_num_tokens)
        self.dummy_row = rows.dummy_row
        self.token_ids = torch.zeros(MAX_CHUNKS, dtype=torch.int32, device=rows.device)
        self._buffers = {size: to_device(self._arranged(size), rows.device) for size in self.sizes}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self, recorder: Recorder) -> None:
        """Record a graph for each size; the rows must have been uploaded."""
        for size in reversed(self.sizes):
            self._graphs[size] = recorder.record(partial(self._compute, size))

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed."""
        return bool(self._graphs)

    def has_room_for(self, num_chunks: int, num_tokens: int) -> bool:
        """Whether a step is small enough for a graph."""
        return num_chunks <= MAX_CHUNKS and num_tokens <= self.sizes[-1]

    def run(
        self, row_numbers: IntArray, lengths: IntArray, positions: IntArray, logits_rows: IntArray, sampled_rows: IntArray
    ) -> Tensor:
        """Compute a step.

        Args:
            row_numbers, lengths: ``[num_chunks]``, the batch row and the number of tokens of each chunk.
            positions: ``[num_tokens]``, of all chunks.
            logits_rows, sampled_rows: ``[num_sampled]``, the last token and the batch row of each chunk that samples.

        Returns:
            The sampled tokens, int32 ``[num_sampled]``, a view that the next step overwrites.
        """
        size = next(size for size in self.sizes if size >= len(positions))
        query_starts = np.zeros(MAX_CHUNKS + 1, dtype=np.int64)  # padding: sequences without tokens, behind the others
        query_starts[1:] = np.pad(lengths, (0, MAX_CHUNKS - len(lengths))).cumsum()
        pieces = (row_numbers.repeat(lengths), positions, row_numbers, logits_rows, sampled_rows, query_starts)
        self._buffers[size].copy_(to_device(self._arranged(size, pieces), self.token_ids.device), non_blocking=True)
        graph = self._graphs.get(size)
        if graph is None:
            self._compute(size)
        else:
            graph.replay()
        return self.token_ids[: len(sampled_rows)]

    def _arranged(self, size: int, pieces: Sequence[IntArray] = ()) -> IntArray:
        """All inputs in one array, each piece padded to its width."""
        fills = (self.dummy_row, 0, self.dummy_row, 0, self.dummy_row, 0)
        together = np.repeat(np.array(fills, dtype=np.int64), self._widths(size))
        first = 0
        for piece, width in zip(pieces, self._widths(size), strict=False):
            together[first : first + len(piece)] = piece
            first += width
        return together

    @staticmethod
    def _widths(size: int) -> list[int]:
        """Width of each piece. Widths are even: Triton compiles another kernel for addresses not divisible by 16."""
        return [size, size, MAX_CHUNKS, MAX_CHUNKS, MAX_CHUNKS, MAX_CHUNKS + 2]

    def _compute(self, size: int) -> None:
        chunks = ChunkInput(*torch.split(self._buffers[size], self._widths(size)))
        self.step(chunks._replace(query_starts=chunks.query_starts[: MAX_CHUNKS + 1]), self.token_ids)
