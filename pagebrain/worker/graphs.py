"""CUDA graphs: a step recorded once for each of a few sizes, and from then on launched as one.

A step of GPT-2 small is some hundred kernels of a few microseconds each; asking for them one by one takes the host longer
than computing them takes the GPU. A graph keeps them as they were asked for, addresses included. So what changes from step
to step lies in buffers that never move: the numbers of the active batch rows go in through one, the sampled tokens come out
through another, and all else is state that the graph itself finds and changes in the batch rows. A batch that is smaller
than the size it was recorded for is filled up with the dummy row.

:class:`DecodeGraphs` come in numbers of sequences, each with one token; :class:`ChunkGraphs` in numbers of tokens, of a few
prompts or chunks of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pagebrain.worker.batch_rows import BatchRows, IntArray, to_device


class Recorder:
    """Records graphs that share their memory: no two of them run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def record(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What ``compute`` launches. It is run once more before, to compile kernels and let cuBLAS choose its own."""
        with torch.cuda.stream(self._stream):
            compute()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            compute()
        return graph


DecodeStep = Callable[[Tensor, Tensor, bool], None]
"""``(active_rows, out, sampled)``: compute the next token of each active row, greedy or as its parameters say."""


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes that graphs are recorded for, the last one ``max_num_seqs``.

    Doubling up to 64, then in steps of a third at most: a graph that is too large costs little, for padding attends to one
    token, and a graph more costs milliseconds at every start.
    """
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size = 2 * size if size < 64 else size + max(32, size // 4 // 32 * 32)
    return (*sizes, max_num_seqs)


class DecodeGraphs:
    """Runs decode steps of up to ``max_num_seqs`` rows.

    Without :meth:`capture` each step is computed launch by launch, over the same buffers and with the same padding.

    Attributes:
        active_rows: int32 ``[max_num_seqs]``, what goes in.
        token_ids: int32 ``[max_num_seqs]``, what comes out.
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
        """Compute a step of each size without recording it, on the dummy row, so that no request waits for a compiler."""
        for size in self.sizes:
            for sampled in (False, True):
                self._compute(size, sampled)

    def capture(self, recorder: "Recorder") -> None:
        """Record a greedy and a sampled graph for each size; the rows must have been uploaded."""
        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            for sampled in (False, True):
                self._graphs[size, sampled] = recorder.record(partial(self._compute, size, sampled))

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed."""
        return bool(self._graphs)

    def run(self, rows: list[int], sampled: bool) -> Tensor:
        """Compute the next token of each of these rows. Returns their tokens, a view that the next step overwrites."""
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
    """Prompts or chunks of them as one flat batch, int64 on the device: what :meth:`BatchRows.chunk_batch` takes, and more.

    From the token that each of ``logits_rows`` names comes the next token of the batch row in ``sampled_rows``.
    """

    token_rows: Tensor
    positions: Tensor
    active_rows: Tensor
    logits_rows: Tensor
    sampled_rows: Tensor
    query_starts: Tensor


ChunkStep = Callable[[ChunkInput, Tensor], None]
"""``(chunks, out)``: compute them, and the next tokens of those that end into ``out``."""

MAX_CHUNKS = 16
"""Chunks that a graph has room for. There are seldom more in a step that is small enough for one."""


def chunk_sizes(max_num_tokens: int) -> tuple[int, ...]:
    """The numbers of tokens that graphs are recorded for.

    A larger step keeps the GPU busy for longer than the host takes to launch it; a smaller one gains by its graph although
    all of its padding is computed.
    """
    sizes = (64, 128, 256, 512, 1024, 2048)
    return tuple(size for size in sizes if size <= max_num_tokens) or (max_num_tokens + max_num_tokens % 2,)


class ChunkGraphs:
    """Computes prompts and chunks of them, up to ``MAX_CHUNKS`` in a step, and the next tokens of those that end.

    Everything that a step needs goes in by one copy, into the buffer of its size. The padding are tokens of the dummy row
    that belong to no sequence, and sequences without tokens.

    Attributes:
        token_ids: int32 ``[MAX_CHUNKS]``, what comes out.
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
        """Whether a step is small enough."""
        return num_chunks <= MAX_CHUNKS and num_tokens <= self.sizes[-1]

    def run(
        self, row_numbers: IntArray, lengths: IntArray, positions: IntArray, logits_rows: IntArray, sampled_rows: IntArray
    ) -> Tensor:
        """Compute a step.

        Args:
            row_numbers, lengths: ``[num_chunks]``, the batch row of each chunk and how many tokens it has.
            positions: ``[num_tokens]``, chunk after chunk.
            logits_rows, sampled_rows: ``[num_sampled]``, the token after which each sequence that samples goes on, and its
                batch row.

        Returns:
            Their tokens, int32 ``[num_sampled]``, a view that the next step overwrites.
        """
        size = next(size for size in self.sizes if size >= len(positions))
        query_starts = np.zeros(MAX_CHUNKS + 1, dtype=np.int64)  # sequences without tokens begin where the others end
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
        """All that goes in, in one array, with padding where a piece ends."""
        fills = (self.dummy_row, 0, self.dummy_row, 0, self.dummy_row, 0)
        together = np.repeat(np.array(fills, dtype=np.int64), self._widths(size))
        first = 0
        for piece, width in zip(pieces, self._widths(size), strict=False):
            together[first : first + len(piece)] = piece
            first += width
        return together

    @staticmethod
    def _widths(size: int) -> list[int]:
        """Numbers of each piece, even ones: to Triton, what begins at no multiple of 16 bytes would be another kernel."""
        return [size, size, MAX_CHUNKS, MAX_CHUNKS, MAX_CHUNKS, MAX_CHUNKS + 2]

    def _compute(self, size: int) -> None:
        chunks = ChunkInput(*torch.split(self._buffers[size], self._widths(size)))
        self.step(chunks._replace(query_starts=chunks.query_starts[: MAX_CHUNKS + 1]), self.token_ids)
