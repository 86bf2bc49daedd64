"""Several samples of one request: the prompt is computed once, its blocks are shared, and each sample has its own tokens."""

from typing import Any

import pytest
import torch

from pagebrain import LLM, SamplingParams
from pagebrain.cache import CacheManager
from pagebrain.engine.engine import Engine
from pagebrain.engine.trace import StepTrace
from pagebrain.errors import StepError
from tests.support.hashing import continuation, hash_engine, is_possible, run_all
from tests.support.kernels import kernel_device, require_kernels
from tests.support.models import random_gpt2

depths = pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
caching = pytest.mark.parametrize("prefix_caching", [False, True], ids=["no cache", "cache"])
PROMPT = [(11 * position) % 96 for position in range(23)]


def sampled(n: int, max_tokens: int = 6, **fields: Any) -> SamplingParams:
    return SamplingParams(n=n, temperature=1.0, seed=3, max_tokens=max_tokens, **fields)


def watched(engine: Engine) -> list[StepTrace]:
    """The traces of an engine's steps, as they come."""
    traces: list[StepTrace] = []
    engine.observers.append(traces.append)
    return traces


def texts_of(output: Any) -> list[list[int]]:
    return [list(sample.token_ids) for sample in output.outputs]


def checked(engine: Engine, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    """The samples of one request, each of them possible, and not all the same."""
    request = engine.add_request(prompt, params)
    texts = texts_of(run_all(engine)[request.request_id])
    assert all(is_possible(prompt, text) for text in texts), texts
    assert params.n < 3 or len(set(map(tuple, texts))) > 1, "the samples should differ"
    engine.check_integrity()
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks
    return texts


@depths
@caching
@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9, 10, 23])
def test_the_prompt_is_computed_once_and_each_sample_keeps_its_own_tokens(
    length: int, prefix_caching: bool, async_scheduling: bool
) -> None:
    """Block size 4. The last block of the prompt is copied if the first token to compute is in its middle."""
    engine = hash_engine(num_blocks=64, prefix_caching=prefix_caching, async_scheduling=async_scheduling, max_num_seqs=8)
    checked(engine, PROMPT[:length], sampled(n=5))
    stats = engine.stats()
    if length > 1:
        assert stats.num_prefill_tokens == length
        assert stats.num_copied_blocks == (4 if (length - 1) % 4 else 0)
    assert stats.num_decode_tokens <= 5 * 6


@pytest.mark.parametrize(
    ("on_kernels", "async_scheduling"),
    [(False, False), (False, True), (True, True)],
    ids=["torch, depth 0", "torch, depth 1", "kernels, depth 1"],
)
def test_samples_are_the_same_as_without_sharing(
    on_kernels: bool, async_scheduling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: dict[str, Any] = {"n_embd": 16, "n_head": 1, "n_layer": 2} if on_kernels else {}
    base: Any = random_gpt2(torch.float32 if on_kernels else torch.float64, seed=5, **shape)
    settings: dict[str, Any] = {"block_size": 4, "num_blocks": 64, "max_num_seqs": 12, "async_scheduling": async_scheduling}
    if on_kernels:
        require_kernels(kernel_device())
        base.to(kernel_device())
        settings["parts"] = {"attention": "pagebrain.attention.triton_backend:TritonBackend"}
    params = [sampled(n=4, max_tokens=3), sampled(n=3, max_tokens=3, repetition_penalty=1.3)]
    prompts = [PROMPT[:7], PROMPT[:9]]
    if not on_kernels:  # which run in the interpreter here
        params += [sampled(n=2, logprobs=2), SamplingParams(n=2, temperature=0, max_tokens=6)]
        prompts += [PROMPT, PROMPT[:14]]
    found = {}
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(CacheManager, "can_share", False, raising=False)
            monkeypatch.setattr(CacheManager, "__setattr__", keep_can_share)
        llm = LLM(base, prefix_caching=False, **settings)
        found[shares] = [texts_of(output) for output in llm.generate(prompts, params)], llm.engine.stats()
    assert found[True][0] == found[False][0]
    assert len({tuple(text) for text in found[True][0][0]}) > 1
    once = sum(map(len, prompts))
    assert found[True][1].num_prefill_tokens == once < found[False][1].num_prefill_tokens
    assert found[True][1].num_copied_blocks == 3 + 0 + (0 if on_kernels else 1 + 1)  # behind 6, 8, 22 and 13 tokens


def keep_can_share(self: CacheManager, name: str, value: Any) -> None:
    """Assignments but for that of ``can_share``."""
    if name != "can_share":
        object.__setattr__(self, name, value)


@depths
def test_samples_that_start_late_begin_as_forks_while_the_first_one_runs(async_scheduling: bool) -> None:
    """Two seats: sample 2 starts when sample 1 has ended. The first sample runs on."""
    engine = hash_engine(num_blocks=64, max_num_seqs=2, async_scheduling=async_scheduling, prefix_caching=False)
    request = engine.add_request(PROMPT, sampled(n=3, max_tokens=20))
    engine.add_request([7], SamplingParams(temperature=0, max_tokens=3))
    outputs = run_all(engine)
    assert all(is_possible(PROMPT, text) for text in texts_of(outputs[request.request_id]))
    assert engine.stats().num_prefill_tokens <= 2 * len(PROMPT) + 1


@depths
def test_after_the_first_sample_has_ended_the_others_find_its_full_blocks(async_scheduling: bool) -> None:
    engine = hash_engine(num_blocks=64, max_num_seqs=8, async_scheduling=async_scheduling)
    texts = checked(engine, PROMPT, sampled(n=4, max_tokens=1))
    assert len(texts) == 4
    assert engine.stats().num_prefill_tokens == 23 + 3 * 3  # 20 of the 23 tokens are in full blocks


@depths
def test_another_request_starts_while_samples_wait_for_their_prompt(async_scheduling: bool) -> None:
    engine = hash_engine(num_blocks=64, max_num_batched_tokens=8, max_num_seqs=8, async_scheduling=async_scheduling)
    traces = watched(engine)
    several = engine.add_request(PROMPT[:10], sampled(n=3))
    other = engine.add_request([5, 6], SamplingParams(temperature=0, max_tokens=3))
    outputs = run_all(engine)
    assert texts_of(outputs[other.request_id]) == [continuation([5, 6], 3)]
    assert all(is_possible(PROMPT[:10], text) for text in texts_of(outputs[several.request_id]))
    assert [row.request_id for row in traces[1].rows] == [several.request_id, other.request_id]


@depths
@pytest.mark.parametrize("failing", range(1, 8))
def test_a_failed_step_leaves_no_sample_with_a_block_that_was_not_copied(failing: int, async_scheduling: bool) -> None:
    engine = hash_engine(num_blocks=64, max_num_batched_tokens=16, max_num_seqs=8, async_scheduling=async_scheduling)
    request = engine.add_request(PROMPT[:22], sampled(n=4, max_tokens=5))
    run, count = engine.executor._run, 0  # type: ignore[attr-defined]

    def broken(step: Any) -> Any:
        nonlocal count
        count += 1
        if count == failing:
            raise RuntimeError("broken")
        return run(step)

    engine.executor._run = broken  # type: ignore[attr-defined]
    outputs: dict[str, Any] = {}
    num_failures = 0
    while engine.has_unfinished_requests:
        try:
            deltas = engine.step()
        except StepError:
            num_failures += 1
            assert num_failures == 1
            continue
        outputs |= {delta.request_id: delta.finished for delta in deltas if delta.finished is not None}
    texts = texts_of(outputs[request.request_id])
    assert all(is_possible(PROMPT[:22], text) for text in texts), texts
    engine.check_integrity()


@depths
def test_an_aborted_request_takes_its_waiting_samples_with_it(async_scheduling: bool) -> None:
    for num_steps in range(6):
        engine = hash_engine(num_blocks=64, max_num_seqs=2, async_scheduling=async_scheduling)
        request = engine.add_request(PROMPT[:10], sampled(n=5))
        for _ in range(num_steps):
            engine.step()
        assert engine.abort(request.request_id)
        run_all(engine)
        engine.check_integrity()
        assert engine.cache_manager.num_free_blocks == 64 and not engine.scheduler.waiting


@depths
def test_samples_share_the_memory_of_the_prompt(async_scheduling: bool) -> None:
    """Five samples of 23 + 6 tokens: 5 shared blocks, and 2 of each sample; 35 blocks without sharing."""
    engine = hash_engine(num_blocks=64, max_num_seqs=8, max_num_batched_tokens=32, async_scheduling=async_scheduling)
    traces = watched(engine)
    checked(engine, PROMPT, sampled(n=5, max_tokens=6))
    assert max(64 - len(trace.free_blocks) for trace in traces) == 5 + 5 * 2


@depths
@caching
def test_preempted_samples_give_the_same_tokens(prefix_caching: bool, async_scheduling: bool) -> None:
    texts = []
    for num_blocks in (64, 12):
        engine = hash_engine(
            num_blocks=num_blocks,
            max_num_seqs=4,
            max_model_len=44,
            max_num_batched_tokens=16,
            prefix_caching=prefix_caching,
            async_scheduling=async_scheduling,
        )
        texts.append(checked(engine, PROMPT[:14], sampled(n=4, max_tokens=18)))
        assert (engine.stats().num_preemptions > 0) == (num_blocks == 12)
    assert texts[0] == texts[1]
