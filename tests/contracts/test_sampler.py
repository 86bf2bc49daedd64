"""What every sampler must do for the engine: a token per row, by that row's parameters, whatever its batch mates."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pagebrain import SamplingParams
from pagebrain.sampling import Sampler, SampleRow

IMPLEMENTATIONS: dict[str, Callable[[Any], Any]] = {"engine": Sampler}
VOCAB_SIZE = 50


@pytest.fixture(params=IMPLEMENTATIONS)
def sampler(request: pytest.FixtureRequest) -> Any:
    return IMPLEMENTATIONS[request.param](SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=(VOCAB_SIZE - 1,)))


def row(params: SamplingParams, seed: int = 0, position: int = 0) -> SampleRow:
    history = torch.arange(3 + position) % VOCAB_SIZE
    return SampleRow(params, seed=seed, sample_index=0, output_position=position, history=history, num_prompt_tokens=3)


def test_greedy_rows_take_the_largest_logit_and_the_first_of_equals(sampler: Any) -> None:
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    logits[2, [7, 31]] = 9.0
    sampled = sampler.sample(logits, [row(SamplingParams(temperature=0))] * 4)
    assert sampled.token_ids.dtype == torch.int64
    assert sampled.token_ids.tolist() == [*logits[:2].argmax(1).tolist(), 7, int(logits[3].argmax())]


def test_a_row_gets_the_same_token_alone_and_beside_others(sampler: Any) -> None:
    logits = torch.randn(40, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    kinds = [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.5)]
    rows = [row(kinds[index % 4], seed=index, position=index) for index in range(40)]
    together = sampler.sample(logits, rows).token_ids.tolist()
    alone = [int(sampler.sample(logits[i : i + 1], [rows[i]]).token_ids) for i in range(40)]
    assert together == alone and len(set(together)) > 10


def test_a_seed_repeats_a_token_and_another_seed_need_not(sampler: Any) -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    drawn = [int(sampler.sample(logits, [row(SamplingParams(), seed=seed)]).token_ids) for seed in range(30)]
    assert drawn == [int(sampler.sample(logits, [row(SamplingParams(), seed=seed)]).token_ids) for seed in range(30)]
    assert len(set(drawn)) > 10
