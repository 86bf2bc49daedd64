"""An engine on batch rows, in Triton's interpreter or on a GPU, whose every row of logits can be looked at afterwards."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from pagebrain import LLM, RequestOutput, SamplingParams
from pagebrain.engine.sequence import SequenceGroup
from pagebrain.engine.trace import StepTrace
from pagebrain.worker.cuda_executor import CudaExecutor
from pagebrain.worker.graphs import MAX_CHUNKS
from tests.support.models import poison

KERNELS = {"attention": "pagebrain.attention.triton_backend:TritonBackend"}
"""Chosen by itself on a GPU; on a CPU it is named, and interpreted."""


class WatchedHead(nn.Module):
    """A head that leaves its logits in a buffer of its own, where a replayed graph leaves them too."""

    def __init__(self, head: nn.Module, num_rows: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.head = head
        self.kept = torch.zeros(num_rows, width, dtype=like.dtype, device=like.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """The head's logits, kept."""
        logits: Tensor = self.head(hidden)
        self.kept[: logits.shape[0]].copy_(logits[:, : self.kept.shape[1]])
        return logits


class FullSpeed:
    """An LLM over poisoned slots that notes its traces and, for steps of decodes alone, each row's logits.

    Attributes:
        traces: one for each step.
        decode_logits: ``(sequence id, context length) -> [vocab_size]``, of what graphs or their stand-in computed.
        num_chunk_graphs: steps whose prompts, or chunks of them, were computed by a graph or its stand-in.
    """

    def __init__(self, base: GPT2LMHeadModel, watched: bool = False, **settings: Any) -> None:
        graphs = settings.pop("cuda_graphs", base.transformer.wte.weight.is_cuda)
        self.llm = LLM(base, parts=KERNELS, cuda_graphs=False, check_integrity=True, **settings)
        executor = self.llm.engine.executor
        assert isinstance(executor, CudaExecutor)
        self.executor = executor
        poison(self.llm.engine.cache_manager.pool)
        self.traces: list[StepTrace] = []
        self.decode_logits: dict[tuple[int, int], Tensor] = {}
        self.llm.engine.observers.append(self.traces.append)
        self.num_chunk_graphs = 0
        self._count_chunk_graphs()
        if watched:
            self._watch()
        if graphs:  # now, so that what is watched is in them
            executor.capture()

    def _count_chunk_graphs(self) -> None:
        run = self.executor.chunks.run

        def counted(*step: Any) -> Tensor:
            self.num_chunk_graphs += 1
            return run(*step)

        self.executor.chunks.run = counted  # type: ignore[method-assign, assignment]

    def _watch(self) -> None:
        model: Any = self.executor.model
        config = self.llm.config
        model.lm_head = WatchedHead(
            model.lm_head, max(config.max_num_seqs, MAX_CHUNKS) + 8, config.vocab_size or 0, model.wte.weight
        )
        launch = self.executor.launch

        def watched_launch(group: Any) -> Any:
            in_flight = launch(group)
            if all(entry.num_tokens == 1 for entry in group):
                kept = model.lm_head.kept.clone()
                for index, entry in enumerate(group):
                    self.decode_logits[entry.seq.seq_id, entry.context_len] = kept[index]
            return in_flight

        self.executor.launch = watched_launch  # type: ignore[method-assign]

    def generate(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
        """What the engine makes of them; afterwards all blocks are free, and all rows."""
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        cache_manager = self.llm.engine.cache_manager
        assert cache_manager.num_free_blocks == self.llm.config.num_blocks
        self.executor.rows.apply(
            SequenceGroup(()).with_changes(cache_manager.take_changes())
        )  # what the next plan would carry
        assert not self.executor.rows._rows
        return outputs

    @property
    def num_mixed(self) -> int:
        """Steps in which prefills and decodes met."""
        return sum({row.phase for row in trace.rows} == {"prefill", "decode"} for trace in self.traces)


def token_lists(outputs: list[RequestOutput]) -> list[list[int]]:
    """The tokens of each sample of each output."""
    return [list(sample.token_ids) for output in outputs for sample in output.outputs]


def num_preemptions(outputs: list[RequestOutput]) -> int:
    """How often one of these requests lost its blocks."""
    return sum(output.metrics.num_preemptions for output in outputs)
