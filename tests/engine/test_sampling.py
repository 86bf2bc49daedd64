"""The sampler keeps, penalises and reports what Hugging Face's logits processors and plain formulas say it should."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pagebrain.errors import ConfigError, StepError
from pagebrain.outputs import TokenLogprobs
from pagebrain.sampling import Sampler, SampleRow, prompt_logprobs, sampler, score_prompt, truncation
from pagebrain.sampling.adjustments import adjust_logits
from pagebrain.sampling.ranking import best_tokens
from pagebrain.sampling_params import SamplingParams

EOS = 0
GREEDY = SamplingParams(temperature=0.0)


def make_sampler(vocab_size: int) -> Sampler:
    return Sampler(SimpleNamespace(vocab_size=vocab_size, eos_token_ids=(EOS,)))  # type: ignore[arg-type]


def make_row(params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = (), seed: int = 0) -> SampleRow:
    history = torch.tensor([*prompt, *output], dtype=torch.int64)
    return SampleRow(params, seed, 0, len(output), history, len(prompt))


def random_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Greedy ---------------------------------------------------------------------------------------------------------------


def test_a_temperature_beyond_float32_draws_evenly_from_what_is_left() -> None:
    """Tokens that ``min_tokens`` rules out stay ruled out, and no NaN decides."""
    params = [SamplingParams(temperature=1e300, seed=seed, min_tokens=9, max_tokens=10) for seed in range(300)]
    logits = random_logits(1, 4, dtype=torch.float32).expand(300, 4).contiguous()
    drawn = make_sampler(4).sample(logits, [make_row(each, seed=seed) for seed, each in enumerate(params)]).token_ids
    counts = Counter(drawn.tolist())
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 60  # 0 ends a text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_best_token_and_the_lower_id_of_equal_ones(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1, 5, 5, 2], [7, 0, 7, 7], [-3, -2, -1, -1]], dtype=dtype)
    drawn = make_sampler(4).sample(logits, [make_row(GREEDY)] * 3)
    assert drawn.token_ids.tolist() == [1, 0, 2]
    assert drawn.token_ids.dtype == torch.int64 and drawn.logprobs is None


def test_the_greedy_fast_path_agrees_with_the_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = random_logits(20, 300), [make_row(GREEDY) for _ in range(20)]
    general = make_sampler(300)._choose(logits, rows)
    monkeypatch.setattr(Sampler, "_choose", lambda *args: pytest.fail("greedy rows must not leave the fast path"))
    assert torch.equal(make_sampler(300).sample(logits, rows).token_ids, general)


def test_no_rows_give_no_tokens() -> None:
    assert make_sampler(10).sample(torch.empty(0, 10), []).token_ids.shape == (0,)


@pytest.mark.parametrize("temperature", [1e-300, 1e-12, 1e-6])
@pytest.mark.parametrize("top_k", [0, 10])
def test_a_temperature_close_to_zero_is_greedy(temperature: float, top_k: int) -> None:
    logits = 100 * random_logits(8, 200, dtype=torch.float32)
    drawn = make_sampler(200).sample(logits, [make_row(SamplingParams(temperature=temperature, top_k=top_k))] * 8)
    assert torch.equal(drawn.token_ids, logits.argmax(1))


# Truncation -----------------------------------------------------------------------------------------------------------


def kept_tokens(logits: Tensor, params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Tokens that can be drawn: each in turn gets so much noise that it wins unless it was dropped.

    Done without batch mates and beside some that need more tokens in order, which must make no difference.
    """
    vocab_size = len(logits)
    mates = [make_row(SamplingParams(top_k=vocab_size - 1)), make_row(SamplingParams(top_p=0.999999))]
    targets = torch.cat([make_sampler(vocab_size)._token_hashes(logits.device), torch.tensor([-1] * len(mates))])

    def favour_token_of_own_row(keys: Tensor, hashes: Tensor, dtype: torch.dtype) -> Tensor:
        return (hashes == targets[: len(keys)].unsqueeze(1)).to(dtype) * 1e6

    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "gumbel_noise", favour_token_of_own_row)
        for rows in ([make_row(params)] * vocab_size, [make_row(params)] * vocab_size + mates):
            drawn = make_sampler(vocab_size).sample(logits.expand(len(rows), -1), rows).token_ids.tolist()
            kept.append({token_id for token_id in range(vocab_size) if drawn[token_id] == token_id})
    assert kept[0] == kept[1]
    return kept[0]


def kept_by_hugging_face(logits: Tensor, params: SamplingParams) -> set[int]:
    chain: list[Any] = [TemperatureLogitsWarper(params.temperature)]
    chain += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    chain += [TopKLogitsWarper(params.top_k)] if params.top_k > 0 else []
    chain += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    scores = logits.unsqueeze(0)
    for warper in chain:
        scores = warper(torch.zeros(1, 1, dtype=torch.int64), scores)
    return set(scores[0].isfinite().nonzero().flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["top_k", "top_p", "min_p", "all"])
def test_kept_tokens_are_those_of_hugging_face(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(kind)
    sizes = set()
    for trial in range(25):
        params = SamplingParams(
            temperature=rng.choice([0.3, 0.7, 1.0, 2.5]),
            top_k=rng.choice([1, 2, 5, 50, 119, 120, 500]) if kind in ("top_k", "all") else rng.choice([0, -1]),
            top_p=rng.choice([1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999]) if kind in ("top_p", "all") else 1.0,
            min_p=rng.choice([1e-6, 0.001, 0.1, 1.0]) if kind in ("min_p", "all") else 0.0,
        )
        logits = random_logits(120, seed=trial, dtype=dtype)
        kept = kept_tokens(logits, params, monkeypatch)
        assert kept == kept_by_hugging_face(logits, params), params
        sizes.add(len(kept))
    assert len(sizes) > 4 and 1 in sizes


def test_top_p_finds_a_nucleus_wider_than_its_first_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "FIRST_WIDTH", 2)
    widths: list[int] = []

    def watched(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
        widths.append(width)
        return best_tokens(scores, width)

    monkeypatch.setattr(truncation, "best_tokens", watched)
    logits, params = random_logits(300), SamplingParams(top_p=0.97)
    kept = kept_tokens(logits, params, monkeypatch)
    assert kept == kept_by_hugging_face(logits, params)
    assert widths[:3] == [2, 16, 128] and 16 < len(kept) < 128


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_at_the_edge_keep_lower_token_ids(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([1, 2, 1, 3, 1, 2, 1, 0], dtype=dtype)  # in order: 3 | 1 5 | 0 2 4 6 | 7
    order = [3, 1, 5, 0, 2, 4, 6, 7]
    for top_k in range(1, 8):
        assert kept_tokens(logits, SamplingParams(top_k=top_k), monkeypatch) == set(order[:top_k])
    uniform = torch.zeros(8, dtype=dtype)
    assert kept_tokens(uniform, SamplingParams(top_p=0.5), monkeypatch) == {0, 1, 2, 3}  # 4 add up to exactly 0.5
    assert kept_tokens(uniform, SamplingParams(top_p=0.51), monkeypatch) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_best_tokens_are_ordered_by_score_then_id(dtype: torch.dtype) -> None:
    scores = random_logits(5, 400, dtype=dtype).round()
    scores[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    scores[1, ::3] = -math.inf
    scores[2, 5], scores[2, 6] = torch.finfo(dtype).max, torch.finfo(dtype).min
    for width in (1, 7, 399, 400):
        values, token_ids = best_tokens(scores, width)
        for i, line in enumerate(scores.tolist()):
            assert token_ids[i].tolist() == sorted(range(400), key=lambda token_id: (-line[token_id], token_id))[:width]
        assert torch.equal(values, scores.gather(1, token_ids))


# Penalties, bias, min_tokens ------------------------------------------------------------------------------------------


def adjusted(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    before = logits.clone()
    result = adjust_logits(logits, rows, (EOS,))
    assert torch.equal(logits, before), "the caller's logits were changed"
    return result


def test_repetition_penalty_is_that_of_hugging_face() -> None:
    logits = random_logits(2, 30)
    prompt, output = [3, 3, 7], [9, 7]
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.tensor([[*prompt, *output]] * 2), logits.clone())
    assert (logits[:, [3, 7, 9]] < 0).any() and (logits[:, [3, 7, 9]] > 0).any()
    row = make_row(SamplingParams(repetition_penalty=1.7), prompt, output)
    assert torch.equal(adjusted(logits, [row, row]), expected)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = random_logits(3, 30)
    prompt, output = [3, 3, 7], [9, 7, 9, 9]
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25)
    got = adjusted(logits, [make_row(GREEDY, prompt, output), make_row(params, prompt, output), make_row(params, prompt)])
    expected = logits.clone()
    for token_id, count in Counter(output).items():
        expected[1, token_id] -= 0.5 - 0.25 * count
    assert torch.allclose(got, expected, atol=1e-12)


def test_all_penalties_at_once_on_ragged_histories() -> None:
    rng = random.Random(0)
    logits, rows, expected = random_logits(12, 50), [], []
    for line in logits.tolist():
        params = SamplingParams(
            repetition_penalty=rng.choice([1.0, 0.8, 1.5]),
            presence_penalty=rng.uniform(-2, 2),
            frequency_penalty=rng.uniform(-2, 2),
        )
        prompt = [rng.randrange(50) for _ in range(rng.randrange(1, 40))]
        output = [rng.randrange(50) for _ in range(rng.randrange(0, 40))]
        for token_id in {*prompt, *output}:
            line[token_id] *= params.repetition_penalty if line[token_id] < 0 else 1 / params.repetition_penalty
        for token_id, count in Counter(output).items():
            line[token_id] -= params.presence_penalty + params.frequency_penalty * count
        rows.append(make_row(params, prompt, output))
        expected.append(line)
    assert torch.allclose(adjusted(logits, rows), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_logit_bias_is_added_after_penalties_and_can_decide_a_greedy_choice() -> None:
    logits = torch.tensor([[4.0, 1.0, 3.0]] * 2)
    plain = make_row(GREEDY)
    biased = make_row(SamplingParams(temperature=0.0, logit_bias={1: 5.0, 0: -100.0}, repetition_penalty=2.0), [1, 1])
    assert make_sampler(3).sample(logits, [plain, biased]).token_ids.tolist() == [0, 1]
    assert adjusted(logits, [plain, biased])[1].tolist() == [4.0 - 100, 1.0 / 2 + 5, 3.0]


def test_no_token_that_ends_the_sample_is_drawn_before_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 1.0]])
    for params, early in (
        (SamplingParams(temperature=0.0, min_tokens=2), 1),
        (SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(1,)), 2),
        (SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(1,), logit_bias={1: 100.0}), 2),
        (SamplingParams(temperature=0.0, min_tokens=2, ignore_eos=True), EOS),
    ):
        for output, expected in (([], early), ([3], early), ([3, 3], 1 if params.logit_bias else EOS)):
            assert make_sampler(4).sample(logits, [make_row(params, [2], output)]).token_ids.tolist() == [expected]


def test_drawing_respects_min_tokens_too() -> None:
    rows = [make_row(SamplingParams(min_tokens=1, top_k=top_k), seed=seed) for seed in range(200) for top_k in (0, 2)]
    drawn = make_sampler(4).sample(torch.tensor([9.0, 8.0, 7.0, 1.0]).expand(400, -1), rows)
    assert EOS not in drawn.token_ids and {1, 2} <= set(drawn.token_ids.tolist())


# Rows do not disturb each other ---------------------------------------------------------------------------------------

KINDS = [
    GREEDY,
    SamplingParams(),
    SamplingParams(temperature=1.7),
    SamplingParams(min_p=0.02),
    SamplingParams(top_k=3),
    SamplingParams(top_k=1500, temperature=3.0),
    SamplingParams(top_p=0.3),
    SamplingParams(top_p=0.98, temperature=20.0),  # a nucleus of most of the vocabulary
    SamplingParams(top_k=40, top_p=0.8, min_p=0.001),
    SamplingParams(temperature=0.0, repetition_penalty=1.4),
    SamplingParams(frequency_penalty=1.0, presence_penalty=0.5, top_p=0.9),
    SamplingParams(logit_bias={5: 20.0}, top_k=10),
    SamplingParams(logprobs=3),
    SamplingParams(temperature=0.0, logprobs=0, min_tokens=5, stop_token_ids=(9,)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_token_and_logprobs_whatever_its_batch_mates_are(dtype: torch.dtype) -> None:
    vocab_size = 3001
    rng = random.Random(1)
    chooser = make_sampler(vocab_size)
    rows = [
        SampleRow(
            params, rng.randrange(-(2**70), 2**70), rng.randrange(4), length, torch.randint(0, vocab_size, (5 + length,)), 5
        )
        for params in KINDS
        for length in (0, 1, 37)
    ]
    logits = random_logits(len(rows), vocab_size).to(dtype)
    alone = [chooser.sample(logits[i : i + 1].clone(), [row]) for i, row in enumerate(rows)]
    tokens = [output.token_ids.item() for output in alone]
    logprobs = [None if output.logprobs is None else output.logprobs.to_list()[0] for output in alone]
    assert len(set(tokens)) > 20 and sum(entry is not None for entry in logprobs) == 6
    for size in (len(rows), 17, 5, 2):
        order = rng.sample(range(len(rows)), size)
        together = chooser.sample(logits[order], [rows[i] for i in order])
        assert together.token_ids.tolist() == [tokens[i] for i in order]
        got = together.logprobs.to_list() if together.logprobs is not None else [None] * size
        assert got == [logprobs[i] for i in order]


def test_samples_of_one_request_differ() -> None:
    logits = torch.zeros(50, 1000)
    rows = [SampleRow(SamplingParams(), 5, index, 0, torch.empty(0, dtype=torch.int64), 0) for index in range(50)]
    assert len(set(make_sampler(1000).sample(logits, rows).token_ids.tolist())) > 40


def test_the_same_token_is_drawn_in_any_dtype_from_the_same_logits() -> None:
    logits = random_logits(200, 500).to(torch.bfloat16)
    rows = [make_row(SamplingParams(top_k=top_k), seed=seed) for seed in range(100) for top_k in (0, 20)]
    drawn = [
        make_sampler(500).sample(logits.to(dtype), rows).token_ids
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_draws_the_same_tokens_and_the_host_does_not_wait_for_it() -> None:
    chooser, rng = make_sampler(3001), random.Random(1)
    rows = [make_row(p, [rng.randrange(3001)] * 9, [rng.randrange(3001)] * n, seed=n) for p in KINDS for n in range(20)]
    logits = random_logits(len(rows), 3001)
    expected = chooser.sample(logits, rows)
    gpu_logits = logits.cuda()
    gpu_rows = [replace(row, history=row.history.cuda()) for row in rows]
    chooser.sample(gpu_logits, gpu_rows)  # the table of hashed token ids is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = chooser.sample(gpu_logits, gpu_rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.token_ids.cpu(), expected.token_ids)  # float64: no score is close enough to its rival to differ
    assert got.logprobs is not None and expected.logprobs is not None
    for ours, theirs in zip(got.logprobs.to_list(), expected.logprobs.to_list(), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours.token_id, ours.rank) == (theirs.token_id, theirs.rank)
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)


# Logprobs -------------------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = random_logits(4, 60)
    params = [
        SamplingParams(logprobs=4, temperature=3.0, top_k=30, presence_penalty=2.0),
        SamplingParams(temperature=0.0),
        SamplingParams(logprobs=0, temperature=0.0, logit_bias={17: 100.0}),
        SamplingParams(logprobs=20, min_p=0.01),
    ]
    output = make_sampler(60).sample(logits, [make_row(p, [1, 2], [3, 4]) for p in params])
    assert output.logprobs is not None
    entries = output.logprobs.to_list()
    assert entries[1] is None and output.token_ids[2] == 17
    expected = logits.log_softmax(1)
    for i in (0, 2, 3):
        entry = entries[i]
        assert entry is not None and entry.token_id == output.token_ids[i]
        order = expected[i].argsort(descending=True).tolist()
        assert entry.logprob == pytest.approx(float(expected[i, entry.token_id]), abs=1e-12)
        assert entry.rank == 1 + order.index(entry.token_id)
        assert [token_id for token_id, _ in entry.top] == order[: params[i].logprobs]
        assert [value for _, value in entry.top] == pytest.approx(
            [float(expected[i, t]) for t in order[: params[i].logprobs]]
        )


def test_equal_logits_are_ranked_by_token_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0]], dtype=torch.bfloat16)
    entries = [prompt_logprobs(score_prompt(logits, torch.tensor([token_id]), 6))[0] for token_id in range(6)]
    assert [entry.rank for entry in entries] == [6, 1, 3, 2, 4, 5]
    assert all([token_id for token_id, _ in entry.top] == [1, 3, 2, 4, 5, 0] for entry in entries)


def test_logprobs_of_low_precision_logits_are_computed_in_float32() -> None:
    logits = (random_logits(3, 5000) - 100).to(torch.bfloat16)
    entries = prompt_logprobs(score_prompt(logits, torch.tensor([1, 2, 3]), 2))
    expected = logits.double().log_softmax(1)
    assert [entry.logprob for entry in entries] == pytest.approx([float(expected[i, i + 1]) for i in range(3)], abs=1e-5)
    assert all(isinstance(entry, TokenLogprobs) and len(entry.top) == 2 for entry in entries)


def test_more_logprobs_than_tokens_give_all_tokens() -> None:
    (entry,) = prompt_logprobs(score_prompt(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 20))
    assert [token_id for token_id, _ in entry.top] == [1, 0]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("params", KINDS[:7])
def test_garbage_logits_are_refused_and_the_rows_named(bad: float, params: SamplingParams) -> None:
    logits = random_logits(3, 2000, dtype=torch.float32)
    logits[1, 1234] = bad
    with pytest.raises(StepError, match=r"rows \[1\]"):
        make_sampler(2000).sample(logits, [make_row(params)] * 3)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", KINDS)
def test_even_garbage_yields_tokens_of_the_vocabulary(
    bad: float, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU nothing looks at the logits first.
    monkeypatch.setattr(sampler, "_refuse_garbage", lambda logits: None)
    for fill in (random_logits(2, 2000, dtype=torch.float32), torch.full((2, 2000), bad)):
        fill[0, 77] = bad
        drawn = make_sampler(2000).sample(fill, [make_row(params, [1], [2])] * 2).token_ids
        assert ((drawn >= 0) & (drawn < 2000)).all()


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((300, 50), -math.inf)
    logits[:, [7, 9]] = 0.0
    rows = [make_row(params, seed=seed) for seed in range(100) for params in (KINDS[1], KINDS[6], KINDS[4])]
    assert set(make_sampler(50).sample(logits, rows).token_ids.tolist()) == {7, 9}


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(StepError, match=r"2 rows must be \[2, 10\], got \[2, 11\]"):
        make_sampler(10).sample(torch.zeros(2, 11), [make_row(GREEDY)] * 2)
    with pytest.raises(StepError, match=r"got \[3, 10\]"):
        make_sampler(10).sample(torch.zeros(3, 10), [make_row(GREEDY)] * 2)


def test_an_unresolved_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        Sampler(SimpleNamespace(vocab_size=None, eos_token_ids=()))  # type: ignore[arg-type]
