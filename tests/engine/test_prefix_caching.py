"""Prefix caching: what an earlier sequence computed is not computed again, and the output never shows it."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from pagebrain import LLM, SamplingParams
from pagebrain.block import BlockKey, BlockManager
from pagebrain.config import PageBrainConfig
from pagebrain.engine.engine import Engine
from pagebrain.engine.trace import StepTrace
from pagebrain.errors import BlockError, ConfigError
from tests.support.hashing import continuation, hash_engine, run_all
from tests.support.kernels import kernel_device, require_kernels
from tests.support.models import hf_greedy, poison, random_gpt2

KERNELS = {"attention": "pagebrain.attention.triton_backend:TritonBackend"}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PREFIX = [(7 * position) % 96 for position in range(24)]
depths = pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])


def watched(engine: Engine) -> list[StepTrace]:
    """The traces of an engine's steps, as they come."""
    traces: list[StepTrace] = []
    engine.observers.append(traces.append)
    return traces


def starts(traces: list[StepTrace]) -> dict[str, int]:
    """Request id -> the position of the first token that was computed for it."""
    found: dict[str, int] = {}
    for trace in traces:
        for row in trace.rows:
            found.setdefault(row.request_id, row.start)
    return found


def served(engine: Engine, prompt: list[int], max_tokens: int = 3) -> Any:
    """One request from its arrival to its output, with nothing beside it."""
    request = engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens))
    output = run_all(engine)[request.request_id]
    assert list(output.outputs[0].token_ids) == continuation(prompt, max_tokens)
    engine.check_integrity()
    return output


@depths
@pytest.mark.parametrize("on_kernels", [False, True], ids=["torch", "kernels"])
def test_a_shared_prefix_is_computed_once_and_the_texts_equal_hugging_face(on_kernels: bool, async_scheduling: bool) -> None:
    shape: dict[str, Any] = {"n_embd": 16, "n_head": 1, "n_layer": 1} if on_kernels else {}
    base: Any = random_gpt2(torch.float32 if on_kernels else torch.float64, seed=5, **shape)
    prompts = [PREFIX + tail for tail in ([1], [2, 3], [], [50, 51, 52, 53, 54])]
    expected = [hf_greedy(base, prompt, 3) for prompt in prompts]
    if on_kernels:
        require_kernels(kernel_device())
        base.to(kernel_device())
    settings: dict[str, Any] = {"parts": KERNELS} if on_kernels else {}
    llm = LLM(base, block_size=8, num_blocks=30, max_num_seqs=4, async_scheduling=async_scheduling, **settings)
    poison(llm.engine.cache_manager.pool)
    traces = watched(llm.engine)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    outputs = [llm.generate(prompts[0], params), llm.generate(prompts[1:], params)]
    assert [list(output.outputs[0].token_ids) for some in outputs for output in some] == expected
    assert list(starts(traces).values()) == [
        0,
        24,
        16,
        24,
    ]  # the third prompt is cached to its end: its last block is computed
    assert [output.num_cached_tokens for some in outputs for output in some] == [0, 24, 16, 24]
    stats = llm.engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (sum(map(len, prompts)), 64)


@depths
def test_a_prompt_that_is_wholly_cached_computes_its_last_block(async_scheduling: bool) -> None:
    engine = hash_engine(async_scheduling=async_scheduling)
    traces = watched(engine)
    for _ in range(2):
        served(engine, PREFIX[:8])
    first, *_ = [row for trace in traces for row in trace.rows if row.request_id == "request-1"]
    assert (first.start, first.num_tokens, first.samples) == (4, 4, True)


@depths
def test_a_block_that_is_not_computed_yet_is_not_found(async_scheduling: bool) -> None:
    """Twins that arrive together both compute their prompt; the block of one of them is findable afterwards."""
    engine = hash_engine(async_scheduling=async_scheduling, max_num_batched_tokens=64)
    traces = watched(engine)
    twins = [engine.add_request(PREFIX[:12], GREEDY) for _ in range(2)]
    outputs = run_all(engine)
    assert [list(outputs[twin.request_id].outputs[0].token_ids) for twin in twins] == [continuation(PREFIX[:12], 6)] * 2
    assert starts(traces) == {"request-0": 0, "request-1": 0}
    engine.check_integrity()  # the duplicates were freed once each
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks
    assert served(engine, PREFIX[:12]).num_cached_tokens == 8


@depths
def test_a_request_behind_its_twin_profits_from_what_was_read_when_it_starts_and_from_the_rest_later(
    async_scheduling: bool,
) -> None:
    engine = hash_engine(block_size=2, num_blocks=60, max_num_batched_tokens=6, async_scheduling=async_scheduling)
    traces = watched(engine)
    prompt = [*PREFIX[:22], *range(60, 70)]
    for token_ids in (PREFIX[:22], prompt):
        engine.add_request(token_ids, GREEDY)
    outputs = run_all(engine)
    assert list(outputs["request-1"].outputs[0].token_ids) == continuation(prompt, 6)
    rows = [row for trace in traces for row in trace.rows if row.request_id == "request-1"]
    shares = [(row.start, row.num_tokens) for row in rows if row.phase == "prefill"]
    # It starts beside the last chunk of the first, tokens 18 to 21. When that was read, tokens 20 and 21 are found too. At
    # depth 1 one step less was read when it starts, and a sequence with a step in flight skips nothing.
    assert shares == ([(12, 2), (14, 5), (19, 5), (24, 5), (29, 3)] if async_scheduling else [(18, 2), (22, 5), (27, 5)])
    assert outputs["request-1"].num_cached_tokens == shares[0][0]


@depths
@pytest.mark.parametrize("budget", [48, 512])
def test_requests_that_arrive_together_compute_a_long_common_beginning_once(budget: int, async_scheduling: bool) -> None:
    """The first one computes it. The others wait for it, and a request that shares nothing does not wait."""
    engine = hash_engine(
        num_blocks=160, max_model_len=100, max_num_seqs=8, max_num_batched_tokens=budget, async_scheduling=async_scheduling
    )
    traces = watched(engine)
    beginning = [(13 * position) % 997 for position in range(64)]
    prompts = [[*beginning, *range(index, index + 5)] for index in range(5)] + [[5, 6, 7]]
    for prompt in prompts:
        engine.add_request(prompt, GREEDY)
    outputs = run_all(engine)
    for number, prompt in enumerate(prompts):
        assert list(outputs[f"request-{number}"].outputs[0].token_ids) == continuation(prompt, 6)
    assert engine.stats().num_prefill_tokens == 64 + 5 * 5 + 3
    first_steps: dict[str, int] = {}
    for trace in traces:
        for row in trace.rows:
            first_steps.setdefault(row.request_id, trace.step)
    assert first_steps["request-5"] < first_steps["request-1"]


@depths
def test_a_request_whose_twin_is_aborted_computes_the_beginning_itself(async_scheduling: bool) -> None:
    engine = hash_engine(num_blocks=160, max_model_len=100, max_num_batched_tokens=16, async_scheduling=async_scheduling)
    beginning = [(13 * position) % 997 for position in range(64)]
    engine.add_request([*beginning, 1], GREEDY)
    request = engine.add_request([*beginning, 2], GREEDY)
    engine.step()
    engine.abort("request-0")
    output = run_all(engine)[request.request_id]
    assert list(output.outputs[0].token_ids) == continuation([*beginning, 2], 6)


def test_the_budget_counts_what_is_left_after_the_hit() -> None:
    engine = hash_engine(max_num_batched_tokens=6)
    served(engine, PREFIX)
    traces = watched(engine)
    served(engine, [*PREFIX, 1, 2, 3], max_tokens=2)
    assert [row.num_tokens for trace in traces for row in trace.rows] == [3, 1], "27 tokens in one step of at most 6"


@depths
def test_cached_blocks_that_are_free_are_counted_once(async_scheduling: bool) -> None:
    """Six blocks: a request of six whose first three are cached and free must start, and needs exactly the other three."""
    engine = hash_engine(num_blocks=6, max_model_len=24, async_scheduling=async_scheduling, max_num_batched_tokens=16)
    served(engine, PREFIX[:13], max_tokens=1)
    assert served(engine, [*PREFIX[:12], *range(9)], max_tokens=3).num_cached_tokens == 12
    engine.add_request(PREFIX[:13], GREEDY)
    engine.add_request([*range(30, 46)], GREEDY)  # needs five: it must wait, although cached blocks are free
    outputs = run_all(engine)
    assert list(outputs["request-3"].outputs[0].token_ids) == continuation([*range(30, 46)], 6)


@depths
def test_a_preempted_sequence_finds_its_own_blocks_again(async_scheduling: bool) -> None:
    prompts = [[position + 40 * index for position in range(9)] for index in range(2)]
    computed = {}
    for caching in (False, True):
        engine = hash_engine(
            num_blocks=8,
            max_model_len=28,
            async_scheduling=async_scheduling,
            prefix_caching=caching,
            max_num_batched_tokens=16,
        )
        traces = watched(engine)
        for prompt in prompts:
            engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=15))
        outputs = run_all(engine)
        assert [list(o.outputs[0].token_ids) for o in outputs.values()] == [continuation(prompt, 15) for prompt in prompts]
        assert sum(len(trace.preempted) for trace in traces) > 0
        computed[caching] = sum(trace.num_tokens for trace in traces)
        assert engine.stats().prefix_cache_hits == 0, "only first starts count"
    assert computed[True] < computed[False]


def test_a_sequence_in_the_middle_of_a_block_skips_nothing() -> None:
    """The next cached block does not follow at the end of its table: the tokens before it are not computed yet."""
    engine = hash_engine(num_blocks=60, max_model_len=80, max_num_batched_tokens=12)
    traces = watched(engine)
    first = [(3 * position) % 96 for position in range(58)]
    second = [*first, *range(10)]
    for token_ids in (first, second):
        engine.add_request(token_ids, GREEDY)
    outputs = run_all(engine)
    assert list(outputs["request-1"].outputs[0].token_ids) == continuation(second, 6)
    rows = [row for trace in traces for row in trace.rows if row.request_id == "request-1" and row.phase == "prefill"]
    assert [(row.start, row.num_tokens) for row in rows] == [(48, 2), (50, 11), (61, 7)]


@depths
@pytest.mark.parametrize("budget", [8, 64])
def test_the_second_turn_of_a_chat_finds_the_answer_of_the_first(async_scheduling: bool, budget: int) -> None:
    engine = hash_engine(async_scheduling=async_scheduling, max_num_batched_tokens=budget)
    first = served(engine, PREFIX[:10], max_tokens=10)
    history = [*PREFIX[:10], *first.outputs[0].token_ids]
    assert served(engine, [*history, 5, 6, 7]).num_cached_tokens == 16  # of 20: the last of them was never computed


def test_log_probabilities_of_a_prompt_need_all_of_it() -> None:
    base = random_gpt2(seed=5)
    llm = LLM(base, block_size=4, num_blocks=32)
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    first, second = llm.generate(PREFIX, params), llm.generate(PREFIX, params)
    assert second[0].prompt_logprobs == first[0].prompt_logprobs and len(second[0].prompt_logprobs or ()) == len(PREFIX)
    assert second[0].num_cached_tokens == 0


def test_requests_share_prefixes_within_one_salt() -> None:
    engine = hash_engine(num_blocks=40)
    found = []
    for salt in (None, "a", "a", "b", None):
        request = engine.add_request(PREFIX, GREEDY, cache_salt=salt)
        output = run_all(engine)[request.request_id]
        assert list(output.outputs[0].token_ids) == continuation(PREFIX, 6)
        found.append(output.num_cached_tokens)
    assert found == [0, 0, 20, 0, 20]


def test_a_sequence_that_was_rolled_back_keeps_the_blocks_it_has() -> None:
    """Its table is longer than what it computed, so the next cached block does not follow at the table's end."""
    engine = hash_engine(max_num_batched_tokens=32)
    served(engine, PREFIX)
    engine.add_request([*PREFIX[:20], *range(60, 72)], GREEDY)
    launch: Any = engine.executor.launch

    def broken(group: Any) -> Any:
        engine.executor.launch = launch  # type: ignore[method-assign]
        raise RuntimeError("broken")

    engine.executor.launch = broken  # type: ignore[method-assign]
    with pytest.raises(Exception, match="broken"):
        engine.step()
    engine.add_request([*PREFIX[:20], *range(60, 72), 7], GREEDY)
    outputs = run_all(engine)
    assert list(outputs["request-1"].outputs[0].token_ids) == continuation([*PREFIX[:20], *range(60, 72)], 6)
    assert list(outputs["request-2"].outputs[0].token_ids) == continuation([*PREFIX[:20], *range(60, 72), 7], 6)


def test_a_failed_step_takes_nothing_out_of_the_cache() -> None:
    engine = hash_engine()
    served(engine, PREFIX)
    launch: Any = engine.executor.launch

    def broken(group: Any) -> Any:
        raise RuntimeError("broken")

    engine.executor.launch = broken  # type: ignore[method-assign]
    engine.add_request([*PREFIX, 9], GREEDY)
    with pytest.raises(Exception, match="broken"):
        engine.step()
    engine.executor.launch = launch  # type: ignore[method-assign]
    engine.check_integrity()
    output = run_all(engine)["request-1"]
    assert list(output.outputs[0].token_ids) == continuation([*PREFIX, 9], 6) and output.num_cached_tokens == 24


@pytest.mark.parametrize("settings", [{"prefix_caching": False}, {"enable_prefix_caching": False}], ids=str)
def test_without_prefix_caching_every_prompt_is_computed(settings: dict[str, Any]) -> None:
    llm = LLM(random_gpt2(seed=5), block_size=4, num_blocks=32, **settings)
    for _ in range(2):
        (output,) = llm.generate([PREFIX], GREEDY)
        assert output.num_cached_tokens == 0
    assert (llm.engine.stats().prefix_cache_queries, llm.engine.stats().num_prefill_tokens) == (0, 2 * len(PREFIX))


def test_two_names_of_the_setting_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="enable_prefix_caching and prefix_caching are two names"):
        LLM(random_gpt2(), prefix_caching=True, enable_prefix_caching=True)


# The block manager's index ---------------------------------------------------------------------------------------------


def manager(num_blocks: int = 6) -> BlockManager:
    return BlockManager(PageBrainConfig(num_blocks=num_blocks, block_size=4))


def chain(length: int, first: int = 0) -> list[BlockKey]:
    keys: list[BlockKey] = []
    for index in range(length):
        keys.append(BlockKey.after(keys[-1].chain_hash if keys else b"", bytes([first + index] * 16)))
    return keys


def test_cached_blocks_are_evicted_last_and_the_one_freed_first_goes_first() -> None:
    blocks, keys = manager(), chain(3)
    held = blocks.allocate(5)
    for block_id, key in zip(held, keys, strict=False):
        blocks.register(block_id, key)
    blocks.free([held[4], held[2], held[1], held[0], held[3]])
    assert blocks.free_blocks == (5, held[4], held[3], held[2], held[1], held[0])
    assert blocks.allocate(4) == [5, held[4], held[3], held[2]]
    assert [blocks.find(key) for key in keys] == [held[0], held[1], None] and blocks.num_evicted == 1


def test_a_sequence_is_evicted_from_its_end() -> None:
    engine = hash_engine(num_blocks=6, max_model_len=24)
    served(engine, PREFIX[:12], max_tokens=1)
    served(engine, [*range(50, 63)], max_tokens=3)  # takes four blocks: one of the three that are cached
    assert served(engine, [*PREFIX[:12], 1], max_tokens=1).num_cached_tokens == 8


def test_a_found_block_can_be_held_again_and_keeps_its_content() -> None:
    blocks, (key,) = manager(2), chain(1)
    (block_id,) = blocks.allocate()
    blocks.register(block_id, key)
    blocks.free([block_id])
    blocks.share(block_id)
    assert (blocks.ref_count(block_id), blocks.num_free_blocks, blocks.find(key)) == (1, 1, block_id)
    assert blocks.allocate() != [block_id]


def test_of_two_blocks_with_one_content_the_first_is_found() -> None:
    blocks, (key,) = manager(), chain(1)
    first, second = blocks.allocate(2)
    blocks.register(first, key)
    blocks.register(second, key)
    assert blocks.find(key) == first and blocks.cached_blocks == {first: key}
    blocks.free([second, first])
    assert sorted(blocks.free_blocks) == list(range(6))


def test_the_tokens_are_compared_and_not_the_hash_alone() -> None:
    blocks, (key,) = manager(), chain(1)
    (block_id,) = blocks.allocate()
    blocks.register(block_id, key)
    assert blocks.find(BlockKey(key.chain_hash, b"\x01" * 16)) is None


def test_what_cannot_be_registered_is_refused() -> None:
    blocks, keys = manager(), chain(2)
    with pytest.raises(BlockError, match="block 3 is free"):
        blocks.register(3, keys[0])
    (block_id,) = blocks.allocate()
    blocks.register(block_id, keys[0])
    with pytest.raises(BlockError, match="another content"):
        blocks.register(block_id, keys[1])
    with pytest.raises(BlockError, match="allocate it first"):
        blocks.share(4)


def test_a_hash_is_the_same_in_another_process() -> None:
    code = "from pagebrain.block import BlockKey; print(BlockKey.after(b'', bytes(range(16))).chain_hash.hex())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == BlockKey.after(b"", bytes(range(16))).chain_hash.hex()
