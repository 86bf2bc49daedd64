"""CUDA graphs: a decode step recorded once for each of a few batch sizes, and from then on launched as one.

A decode step of GPT-2 small is some hundred kernels of a few microseconds each; asking for them one by one takes the host
longer than computing them takes the GPU. A graph keeps them as they were asked for, addresses included. So what changes from
step to step lies in buffers that never move: the numbers of the active batch rows go in through one, the sampled tokens come
out through another, and all else is state that the graph itself finds and changes in the batch rows. A batch that is smaller
than the size it was recorded for is filled up with the dummy row.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pagebrain.batch_rows import BatchRows, to_device

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

    def capture(self) -> None:
        """Record a greedy and a sampled graph for each size; the rows must have been uploaded."""
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            for sampled in (False, True):
                with torch.cuda.stream(stream):  # once without recording: to compile kernels and let cuBLAS choose its own
                    self._compute(size, sampled)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    self._compute(size, sampled)
                self._graphs[size, sampled] = graph
        torch.cuda.synchronize(self.device)

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
