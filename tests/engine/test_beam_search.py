"""Beam search: the outputs and scores of Hugging Face, with beams that share blocks."""

import itertools
import re
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from pagebrain import LLM, BeamSearchParams, PageBrainConfig, SamplingParams
from pagebrain.block import BlockManager
from pagebrain.cache import CacheManager
from pagebrain.engine.scheduler import Scheduler
from pagebrain.engine.sequence import Request, Sequence
from pagebrain.engine.trace import StepTrace
from pagebrain.errors import InvalidRequestError, StepError
from tests.support.kernels import kernel_device, require_kernels
from tests.support.models import hf_greedy, random_gpt2

depths = pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
PROMPTS = [[1, 2, 3, 4, 5], [7] * 9, [20], [9, 8, 7, 6, 5, 4, 3, 2]]
EOS = 11


@pytest.fixture(scope="module")
def base() -> GPT2LMHeadModel:
    """A model whose beams end now and then: its end of sequence is a token that is often among the likely ones."""
    model = random_gpt2(seed=5, vocab_size=24, bos_token_id=EOS, eos_token_id=EOS)
    with torch.no_grad():
        model.transformer.wte.weight[EOS] *= 1.3
    return model


Found = list[tuple[tuple[int, ...], float]]


def hugging_face(base: GPT2LMHeadModel, prompt: list[int], params: BeamSearchParams) -> Found:
    """Outputs and scores, best first."""
    model: Any = base
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]),
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=None if params.ignore_eos else EOS,
            pad_token_id=EOS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    scores = found.sequences_scores.tolist() if params.beam_width > 1 else [0.0]
    texts = [row[len(prompt) :] for row in found.sequences.tolist()]
    return [(without_padding(text), score) for text, score in zip(texts, scores, strict=True)]


def without_padding(token_ids: list[int]) -> tuple[int, ...]:
    """Up to the first end of sequence, with it."""
    end = token_ids.index(EOS) + 1 if EOS in token_ids else len(token_ids)
    return tuple(token_ids[:end])


def ours(llm: LLM, prompts: list[list[int]], params: BeamSearchParams) -> list[Found]:
    outputs = llm.beam_search(prompts, params)
    assert llm.engine.cache_manager.num_free_blocks == llm.engine.cache_manager.num_blocks
    llm.engine.check_integrity()
    return [
        [(found.tokens[len(prompt) :], found.score) for found in output.sequences]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def assert_same(found: list[Found], expected: list[Found]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in theirs]
        # Hugging Face computes log-probabilities and their sum in float32.
        assert [score for _, score in mine] == pytest.approx([score for _, score in theirs], rel=1e-6, abs=1e-5)


@depths
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_outputs_and_scores_are_those_of_hugging_face(
    base: GPT2LMHeadModel, early_stopping: Any, async_scheduling: bool
) -> None:
    llm = LLM(base, num_blocks=96, block_size=4, async_scheduling=async_scheduling, check_integrity=True)
    found = []
    for width, length_penalty in itertools.product((2, 3, 5), (-1.0, 0.0, 0.6, 2.0)):
        params = BeamSearchParams(width, 9, length_penalty=length_penalty, early_stopping=early_stopping)
        found += ours(llm, PROMPTS, params)
        assert_same(found[-len(PROMPTS) :], [hugging_face(base, prompt, params) for prompt in PROMPTS])
    lengths = {(tokens[-1] == EOS, len(tokens)) for output in found for tokens, _ in output}
    assert (False, 9) in lengths and sum(is_eos for is_eos, _ in lengths) > 2


def test_each_kind_of_early_stopping_ends_a_search_at_its_own_time(base: GPT2LMHeadModel) -> None:
    found, num_tokens = [], []
    for early_stopping in (True, False, "never"):
        llm = LLM(base, num_blocks=96, block_size=4)
        params = BeamSearchParams(5, 20, length_penalty=0.6, early_stopping=early_stopping)
        found.append(ours(llm, PROMPTS, params))
        num_tokens.append(llm.engine.stats().num_decode_tokens)
        assert_same(found[-1], [hugging_face(base, prompt, params) for prompt in PROMPTS])
    assert num_tokens == sorted(set(num_tokens)) and len(set(map(str, found))) == 3


@depths
@pytest.mark.parametrize("prefix_caching", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_beams_share_blocks_and_copy_only_the_last(
    base: GPT2LMHeadModel, block_size: int, prefix_caching: bool, async_scheduling: bool
) -> None:
    llm = LLM(
        base,
        num_blocks=96,
        block_size=block_size,
        prefix_caching=prefix_caching,
        async_scheduling=async_scheduling,
        check_integrity=True,
    )
    traces: list[StepTrace] = []
    llm.engine.observers.append(traces.append)
    params = BeamSearchParams(4, 8, ignore_eos=True)
    assert_same(ours(llm, PROMPTS[1:2], params), [hugging_face(base, PROMPTS[1], params)])
    stats = llm.engine.stats()
    assert stats.num_prefill_tokens == len(PROMPTS[1]), "the prompt is computed once"
    assert stats.num_decode_tokens == 4 * 7, "and after it one token of each beam in each step"
    assert (stats.num_copied_blocks > 0) == (block_size > 1)
    fullest = max((trace.block_tables for trace in traces), key=lambda tables: sum(map(len, tables.values())))
    held = [block for table in fullest.values() for block in table]
    assert len(fullest) == 4 and (len(set(held)) < len(held) or block_size == 16)


@depths
def test_without_blocks_or_seats_beams_wait_and_the_outputs_stay_the_same(
    base: GPT2LMHeadModel, async_scheduling: bool
) -> None:
    params = BeamSearchParams(4, 9)
    expected = [hugging_face(base, prompt, params) for prompt in PROMPTS]
    for num_blocks, max_num_seqs in ((6, 8), (9, 16), (96, 2), (96, 5), (6, 3)):
        llm = LLM(
            base,
            num_blocks=num_blocks,
            block_size=4,
            max_model_len=20,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs,
            async_scheduling=async_scheduling,
            check_integrity=True,
        )
        assert_same(ours(llm, PROMPTS, params), expected)
        stats = llm.engine.stats()
        assert stats.num_prefill_tokens > sum(map(len, PROMPTS)), "some beams computed their tokens again"


@depths
def test_samples_and_beams_run_beside_each_other(base: GPT2LMHeadModel, async_scheduling: bool) -> None:
    params = BeamSearchParams(3, 9, length_penalty=0.5)
    llm = LLM(base, num_blocks=14, block_size=4, max_num_seqs=5, async_scheduling=async_scheduling, check_integrity=True)
    engine = llm.engine
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    others = [engine.add_request(prompt, greedy, wants_deltas=False).request_id for prompt in PROMPTS]
    beams = [engine.add_request(prompt, params).request_id for prompt in PROMPTS]
    sampled = SamplingParams(n=2, seed=4, max_tokens=6, ignore_eos=True)
    alone = LLM(base, num_blocks=96, block_size=4).generate(PROMPTS[0], sampled)[0]
    last = engine.add_request(PROMPTS[0], sampled, wants_deltas=False).request_id
    outputs: dict[str, Any] = {}
    while engine.has_unfinished_requests:
        outputs.update({delta.request_id: delta.finished for delta in engine.step() if delta.finished is not None})
    assert [list(outputs[name].outputs[0].token_ids) for name in others] == [
        hf_greedy(base, prompt, 12) for prompt in PROMPTS
    ]
    assert [sample.token_ids for sample in outputs[last].outputs] == [sample.token_ids for sample in alone.outputs]
    found = [[(sample.token_ids, sample.score) for sample in outputs[name].outputs] for name in beams]
    assert_same(found, [hugging_face(base, prompt, params) for prompt in PROMPTS])
    assert engine.stats().num_preemptions > 0


@depths
@pytest.mark.parametrize("failing", [1, 2, 3, 5, 8])
def test_a_step_that_fails_changes_no_output(base: GPT2LMHeadModel, failing: int, async_scheduling: bool) -> None:
    llm = LLM(base, num_blocks=24, block_size=4, max_num_batched_tokens=8, async_scheduling=async_scheduling)
    engine, params, count = llm.engine, BeamSearchParams(3, 7), 0
    run = engine.executor._run  # type: ignore[attr-defined]

    def broken(step: Any) -> Any:
        nonlocal count
        count += 1
        if count == failing:
            raise RuntimeError("broken")
        return run(step)

    engine.executor._run = broken  # type: ignore[attr-defined]
    requests = [engine.add_request(prompt, params).request_id for prompt in PROMPTS[:2]]
    outputs: dict[str, Any] = {}
    num_failed = 0
    while engine.has_unfinished_requests:
        try:
            outputs.update({delta.request_id: delta.finished for delta in engine.step() if delta.finished is not None})
        except StepError:
            num_failed += 1
    assert num_failed == 1
    found = [[(sample.token_ids, sample.score) for sample in outputs[name].outputs] for name in requests]
    assert_same(found, [hugging_face(base, prompt, params) for prompt in PROMPTS[:2]])


@depths
def test_an_aborted_search_leaves_no_block_behind(base: GPT2LMHeadModel, async_scheduling: bool) -> None:
    llm = LLM(base, num_blocks=24, block_size=4, async_scheduling=async_scheduling, check_integrity=True)
    engine, params = llm.engine, BeamSearchParams(3, 9)
    expected = [hugging_face(base, PROMPTS[0], params)]
    for num_steps in range(7):
        request = engine.add_request(PROMPTS[1], params).request_id
        for _ in range(num_steps):
            engine.step()
        assert engine.abort(request) and not engine.abort(request)
        assert_same(ours(llm, PROMPTS[:1], params), expected)  # which forks before a plan has carried the copies


@pytest.mark.parametrize("async_scheduling", [True])
def test_kernels_and_batch_rows_find_the_same_beams(async_scheduling: bool) -> None:
    """Against the torch operations: in the interpreter, a small model."""
    from tests.support.full_speed import FullSpeed

    device = kernel_device()
    require_kernels(device)
    model: Any = random_gpt2(torch.float32, seed=5, n_layer=1, n_head=1, n_embd=16, vocab_size=24)
    params = BeamSearchParams(3, 4, ignore_eos=True)
    expected = ours(LLM(model, num_blocks=24, block_size=4), PROMPTS[:2], params)
    engine = FullSpeed(model.to(device), block_size=4, num_blocks=24, max_num_seqs=6, async_scheduling=async_scheduling)
    assert_same(ours(engine.llm, PROMPTS[:2], params), expected)


def test_a_beam_of_one_is_greedy_and_its_text_ends_before_the_end_of_sequence() -> None:
    llm = LLM(num_blocks=32)
    (output,) = llm.beam_search("Once upon a time", BeamSearchParams(1, 12))
    (greedy,) = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=12, logprobs=0))
    (found,) = output.sequences
    assert found.text == greedy.outputs[0].text and found.finish_reason == greedy.outputs[0].finish_reason
    assert found.tokens == greedy.prompt_token_ids + greedy.outputs[0].token_ids
    assert found.cum_logprob == pytest.approx(greedy.outputs[0].cumulative_logprob)


def test_what_cannot_be_searched_is_refused_by_name(base: GPT2LMHeadModel) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"beam_width": 0}, "beam_width must be between 1 and 128, got 0"),
        ({"beam_width": True}, "beam_width must be an integer"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": 0.7}, "temperature must be 0, got 0.7"),
        ({"length_penalty": float("nan")}, "length_penalty must be at least -10 and at most 10"),
        ({"early_stopping": "always"}, "early_stopping must be True, False or 'never', got 'always'"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
    ]
    for fields, message in refused:
        with pytest.raises(InvalidRequestError, match=re.escape(message)):
            BeamSearchParams(**{"beam_width": 2} | fields)
    llm = LLM(base, num_blocks=24, block_size=4)
    with pytest.raises(InvalidRequestError, match="beam_width 13 needs 26 candidates, but the vocabulary has 24 tokens"):
        llm.beam_search(PROMPTS, BeamSearchParams(13, 4))
    with pytest.raises(InvalidRequestError, match="params must be BeamSearchParams"):
        llm.beam_search(PROMPTS, SamplingParams())  # type: ignore[arg-type]
    assert llm.engine.num_unfinished_requests == 0


class PlainScheduler(Scheduler):
    """A scheduler that does not know beams."""

    supports = frozenset({"async_scheduling", "prefix_caching"})


def test_with_a_part_that_does_not_know_beams_a_search_is_refused_by_name(base: GPT2LMHeadModel) -> None:
    llm = LLM(base, num_blocks=24, block_size=4, parts={"scheduler": PlainScheduler})
    with pytest.raises(InvalidRequestError, match="the scheduler in use does not support beam search"):
        llm.beam_search(PROMPTS, BeamSearchParams(2, 4))
    assert len(llm.generate(PROMPTS, SamplingParams(max_tokens=2), use_tqdm=False)) == len(PROMPTS)


def test_a_block_that_was_freed_before_its_copy_is_no_target_any_more() -> None:
    """A search is aborted after its beams forked and before the next plan. Another fork may get its blocks meanwhile."""
    config = PageBrainConfig(block_size=4, num_blocks=8)
    cache = CacheManager(BlockManager(config), config)
    request = Request("a", None, (1, 2, 3, 4, 5), SamplingParams(), 0, 0, 0.0)
    parent, aborted, other = (Sequence(seq_id, request, 0, 8) for seq_id in range(3))
    cache.grow(0, 5)
    cache.take_changes()
    cache.fork(parent, aborted, 5)
    cache.free(1)
    cache.fork(parent, other, 5)
    assert cache.take_changes().copied_blocks == ((cache.block_table(0)[1], cache.block_table(2)[1]),)


def test_beams_take_the_seats_of_those_that_they_continue_and_wait_before_all_others(base: GPT2LMHeadModel) -> None:
    llm = LLM(base, num_blocks=24, block_size=4, max_num_seqs=4)
    request = Request("a", None, (1, 2, 3), SamplingParams(), 0, 0, 0.0)
    first, last, ended, queued, fork, one, two = (Sequence(seq_id, request, 0, 8) for seq_id in range(7))
    scheduler: Any = llm.engine.scheduler
    scheduler.running[:] = [first, ended, last]
    scheduler.waiting.append(queued)
    assert (scheduler.num_seats([]), scheduler.num_seats([ended])) == (1, 2)
    scheduler.continue_with([ended], [fork], [one, two])
    assert scheduler.running == [first, fork, last] and list(scheduler.waiting) == [one, two, queued]
