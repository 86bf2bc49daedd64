"""The engine with the kernels generates what it generates without them."""

from typing import Any

import pytest
import torch

from pagebrain import LLM, SamplingParams
from tests.support.kernels import noting
from tests.support.models import hf_greedy, poison, random_gpt2

PROMPTS = [[1, 2, 3, 4, 5], [7] * 7, [40]]
GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_tokens_are_those_of_hugging_face(async_scheduling: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, with chunks small enough that prefills and decodes meet in one step, and after a preemption."""
    from pagebrain.kernels import paged

    launched: list[str] = []
    for name in ("paged_decode", "paged_prefill"):
        monkeypatch.setattr(paged, name, noting(name, launched.append, getattr(paged, name)))

    base: Any = random_gpt2(torch.float32, seed=3)
    expected = [hf_greedy(base, prompt, 7) for prompt in PROMPTS]
    parts = {"attention": "pagebrain.attention.triton_backend:TritonBackend"}
    settings: dict[str, Any] = {"block_size": 8, "num_blocks": 3, "max_num_seqs": 3, "max_num_batched_tokens": 6}
    llm = LLM(base.to(device), parts=parts, async_scheduling=async_scheduling, check_integrity=True, **settings)
    assert llm.config.async_scheduling == async_scheduling
    poison(llm.engine.cache_manager.pool)
    traces: list[Any] = []
    llm.engine.observers.append(traces.append)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)

    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    mixed = sum({row.phase for row in trace.rows} == {"prefill", "decode"} for trace in traces)
    assert mixed > 0 and set(launched) == {"paged_decode", "paged_prefill"}
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


def test_the_kernels_are_told_how_many_sequences_decode(device: str) -> None:
    """So a step of decodes alone launches one kernel a layer, and no step asks the GPU."""
    from pagebrain.attention.triton_backend import TritonBackend

    told: list[tuple[int | None, int]] = []

    class Watched(TritonBackend):
        supports = frozenset()  # no batch rows, so that nothing is recorded in a graph

        def attend(self, layer: int, query: Any, pool: Any, batch: Any, scale: float) -> Any:
            told.append((batch.num_decodes, int((batch.query_starts.diff() == 1).sum())))
            return super().attend(layer, query, pool, batch, scale)

    base: Any = random_gpt2(torch.float32, n_layer=1)
    llm = LLM(base.to(device), num_blocks=8, block_size=16, parts={"attention": Watched})
    llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert told and all(said == counted for said, counted in told)
    assert {said for said, _ in told} >= {1, 3}
