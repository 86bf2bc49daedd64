"""The engine's tokens and logprobs are Hugging Face's, and do not depend on how the engine came by them.

Block size, chunk size, batch mates, preemption, launching ahead: each may change when and where things are computed, never
what comes out. In float64, so that a difference is a bug and not rounding; and each test makes sure that the thing happened.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from pagebrain import LLM, RequestOutput, SamplingParams
from pagebrain.engine.trace import StepTrace
from pagebrain.layers.linear import can_pack
from tests.support.models import hf_greedy, hf_logits, poison, random_gpt2
from tests.support.tokenizers import VOCAB_SIZE, byte_tokenizer

EOS = 96
PROMPTS = [[1, 2, 3], [7] * 17, [40, 41, 42, 43, 44], list(range(30)), [95], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=11, n=2, max_tokens=24, repetition_penalty=1.2)
VARIANTS: dict[str, dict[str, Any]] = {
    "roomy": {"num_blocks": 64, "max_num_batched_tokens": 256},
    "block size 1": {"block_size": 1, "num_blocks": 400},
    "block size 16": {"block_size": 16, "num_blocks": 32},
    "small chunks": {"num_blocks": 128, "max_num_seqs": 4, "max_num_batched_tokens": 5},
    "one at a time": {"num_blocks": 64, "max_num_seqs": 1},
    "preemption": {"num_blocks": 16},
    "launching ahead": {"num_blocks": 64, "async_scheduling": True, "max_num_batched_tokens": 16},
    "ahead with preemption": {"num_blocks": 16, "async_scheduling": True, "max_num_batched_tokens": 16},
}


@pytest.fixture(scope="module")
def base() -> GPT2LMHeadModel:
    return random_gpt2(seed=5)


def run(base: GPT2LMHeadModel, params: SamplingParams, **settings: Any) -> tuple[list[RequestOutput], list[StepTrace]]:
    """All prompts through an engine over poisoned slots, with its traces."""
    defaults: dict[str, Any] = {"block_size": 4, "max_num_seqs": 8, "check_integrity": True}
    llm = LLM(base, **(defaults | settings))
    poison(llm.engine.cache_manager.pool)
    traces: list[StepTrace] = []
    llm.engine.observers.append(traces.append)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert llm.engine.cache_manager.num_free_blocks == llm.config.num_blocks
    return outputs, traces


def tokens(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_output_does_not_depend_on(name: str, params: SamplingParams, base: GPT2LMHeadModel) -> None:
    outputs, traces = run(base, params, **VARIANTS[name])
    if params.greedy:
        assert tokens(outputs) == [[tuple(hf_greedy(base, prompt, 24))] for prompt in PROMPTS]
    else:
        alone, _ = run(base, params, num_blocks=64, max_num_seqs=1)
        assert tokens(outputs) == tokens(alone)
        assert len({sample for output in tokens(outputs) for sample in output}) > len(PROMPTS)  # samples differ

    preemptions = sum(output.metrics.num_preemptions for output in outputs)
    assert (preemptions > 0) == ("preemption" in name)
    assert sum(len(trace.preempted) for trace in traces) == preemptions
    if name in ("small chunks", "launching ahead"):
        assert any({row.phase for row in trace.rows} == {"prefill", "decode"} for trace in traces)
    if name == "small chunks":
        assert all(trace.num_tokens <= 5 for trace in traces)
        assert any(row.phase == "prefill" and row.start > 0 for trace in traces for row in trace.rows)
    if name == "roomy":
        assert max(len(trace.rows) for trace in traces) >= len(PROMPTS)


def test_launching_ahead_really_launches_before_reading(base: GPT2LMHeadModel) -> None:
    _, plain = run(base, GREEDY, num_blocks=64)
    _, ahead = run(base, GREEDY, num_blocks=64, async_scheduling=True)
    assert all(later.launched_s > earlier.read_s for earlier, later in zip(plain, plain[1:], strict=False))
    overlapping = [later.launched_s < earlier.read_s for earlier, later in zip(ahead, ahead[1:], strict=False)]
    assert sum(overlapping) >= len(overlapping) - 1


def test_a_stop_in_mid_flight_discards_what_was_launched_past_it(base: GPT2LMHeadModel) -> None:
    full = hf_greedy(base, PROMPTS[0], 24)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=[full[5]])
    expected = full[: full.index(full[5]) + 1]
    for async_scheduling in (False, True):
        llm = LLM(base, block_size=4, num_blocks=64, async_scheduling=async_scheduling, check_integrity=True)
        sample = llm.generate([PROMPTS[0]], params, use_tqdm=False)[0].outputs[0]
        assert list(sample.token_ids) == expected
        assert (sample.finish_reason, sample.stop_reason) == ("stop", full[5])
        assert not llm.engine.has_unfinished_requests and llm.engine.cache_manager.num_free_blocks == 64


def test_nothing_is_launched_past_max_tokens_or_the_last_position(base: GPT2LMHeadModel) -> None:
    for async_scheduling in (False, True):
        llm = LLM(base, block_size=4, num_blocks=64, async_scheduling=async_scheduling)
        traces: list[StepTrace] = []
        llm.engine.observers.append(traces.append)
        few = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        unlimited = SamplingParams(temperature=0, ignore_eos=True)
        outputs = llm.generate([[1, 2, 3], [4] * 50], [few, unlimited], use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 14]
        assert [output.outputs[0].finish_reason for output in outputs] == ["length", "length"]
        computed = {row.seq_id: row.start + row.num_tokens for trace in traces for row in trace.rows}
        assert computed == {0: 5, 1: 63}  # the last token of each is never computed


def test_end_of_sequence_ends_the_sample_and_ignore_eos_does_not() -> None:
    base = random_gpt2(seed=5)
    prompt = PROMPTS[1]
    eos = hf_greedy(base, prompt, 6)[-1]
    base.config.eos_token_id = eos
    llm = LLM(base, num_blocks=64)
    stops = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)[0].outputs[0]
    assert list(stops.token_ids) == hf_greedy(base, prompt, 24, eos) and stops.finish_reason == "stop"
    goes_on = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)[0].outputs[
        0
    ]
    assert list(goes_on.token_ids) == hf_greedy(base, prompt, 24) and goes_on.finish_reason == "length"
    later = SamplingParams(temperature=0, max_tokens=24, min_tokens=20)
    assert len(llm.generate(prompt, later, use_tqdm=False)[0].outputs[0].token_ids) >= 20


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_seqs": 3, "max_num_batched_tokens": 4}, {"num_blocks": 16}, {"async_scheduling": True}]
)
def test_logprobs_of_prompt_and_output_equal_hugging_face(settings: dict[str, Any], base: GPT2LMHeadModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    outputs, _ = run(base, params, **({"num_blocks": 64} | settings))
    if settings.get("num_blocks") == 16:
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        sample = output.outputs[0]
        sequence = prompt + list(sample.token_ids)
        expected = hf_logits(base, sequence).log_softmax(-1)
        assert output.prompt_logprobs is not None and sample.logprobs is not None
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
        scored = [*output.prompt_logprobs[1:], *sample.logprobs]
        assert len(scored) == len(sequence) - 1
        for position, entry in enumerate(scored, start=1):
            row = expected[position - 1]
            assert entry is not None and entry.token_id == sequence[position]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-9)
            assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
            best = row.topk(len(entry.top))
            assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-9)
        assert sample.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in sample.logprobs))


def test_an_owned_model_with_packed_weights_gives_the_same_tokens(tmp_path: Path) -> None:
    eos = VOCAB_SIZE - 1
    base = random_gpt2(torch.float32, seed=5, n_embd=96, vocab_size=VOCAB_SIZE, eos_token_id=eos, bos_token_id=eos)
    base.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), num_blocks=64, dtype="float32", device="cpu")
    assert llm.weights_packed == can_pack(torch.float32, torch.device("cpu"))
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, GREEDY, use_tqdm=False), strict=True):
        assert_same_but_for_ties(base, prompt, list(output.outputs[0].token_ids))


def assert_same_but_for_ties(base: GPT2LMHeadModel, prompt: list[int], token_ids: list[int]) -> None:
    """Equal to Hugging Face's greedy tokens, or where they part its two best scores are closer than rounding tells apart."""
    expected = hf_greedy(base, prompt, len(token_ids))
    if token_ids != expected:
        split = next(i for i, (a, b) in enumerate(zip(token_ids, expected, strict=True)) if a != b)
        best = hf_logits(base, prompt + expected[:split])[-1].topk(2).values
        assert best[0] - best[1] < 10 * 1e-4
