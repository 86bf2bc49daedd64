"""Swapping: K and V of a preempted sequence go to CPU memory and come back, and the tokens stay the same."""

from typing import Any

import pytest
import torch

from pagebrain import LLM, BeamSearchParams, PageBrainConfig, SamplingParams
from pagebrain.engine.engine import Engine
from pagebrain.engine.scheduler import Scheduler
from pagebrain.errors import ConfigError, IntegrityError, StepError
from pagebrain.swap_space import PreemptionCosts, SwapSpace
from tests.support.hashing import continuation, hash_engine, is_possible, run_all
from tests.support.kernels import kernel_device, require_kernels
from tests.support.models import hf_greedy, random_gpt2

depths = pytest.mark.parametrize("async_scheduling", [False, True], ids=["depth 0", "depth 1"])
caching = pytest.mark.parametrize("prefix_caching", [False, True], ids=["no cache", "cache"])
PROMPTS = [[(7 * start + 3 * position) % 96 for position in range(length)] for start, length in enumerate((9, 14, 6, 11, 5))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
HASH_BLOCK_BYTES = 64


def swapping_engine(num_slots: int = 64, **settings: Any) -> Engine:
    """A hash engine with few blocks; each freed block is overwritten by its next owner at once."""
    few: dict[str, Any] = {"num_blocks": 9, "preemption_mode": "swap", "max_model_len": 32}
    return hash_engine(swap_space_gib=num_slots * HASH_BLOCK_BYTES / 2**30, **few | settings)


def assert_right(engine: Engine, prompts: list[list[int]] = PROMPTS) -> None:
    """Greedy requests get their tokens, and no block and no slot is lost."""
    names = [engine.add_request(prompt, GREEDY).request_id for prompt in prompts]
    outputs = run_all(engine)
    for name, prompt in zip(names, prompts, strict=True):
        assert list(outputs[name].outputs[0].token_ids) == continuation(prompt, 12)
    assert_nothing_is_held(engine)


def assert_nothing_is_held(engine: Engine) -> None:
    engine.check_integrity()
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks
    assert engine.cache_manager.swap_space.num_held == 0 and engine.stats().num_swapped == 0


@depths
@caching
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_swapped_sequences_go_on_with_the_same_tokens_and_compute_none_again(
    block_size: int, prefix_caching: bool, async_scheduling: bool
) -> None:
    engine = swapping_engine(
        num_blocks=36 // block_size, block_size=block_size, prefix_caching=prefix_caching, async_scheduling=async_scheduling
    )
    assert_right(engine)
    stats = engine.stats()
    assert stats.num_preemptions > 0 and stats.num_swapped_out_blocks > 0
    if prefix_caching:
        assert stats.num_swapped_in_blocks < stats.num_swapped_out_blocks, "some blocks were in the prefix cache still"
    else:
        assert stats.num_swapped_in_blocks == stats.num_swapped_out_blocks
        assert stats.num_prefill_tokens == sum(map(len, PROMPTS))
        assert stats.num_decode_tokens == 11 * len(PROMPTS)


@depths
def test_blocks_that_came_back_can_be_found(async_scheduling: bool) -> None:
    engine = swapping_engine(async_scheduling=async_scheduling, num_blocks=8)
    names = [engine.add_request(prompt, GREEDY).request_id for prompt in PROMPTS[:3]]
    back = None
    while back is None:
        engine.step()
        back = next((seq for seq in engine.scheduler.running if seq.num_preemptions and seq.num_computed > 16), None)
    table = engine.cache_manager.block_table(back.seq_id)
    blocks = engine.cache_manager.block_manager
    assert [blocks.find(key) for key in back.block_keys[:4]] == list(table[:4])  # type: ignore[attr-defined]
    assert engine.stats().num_swapped_in_blocks > 0
    assert len(run_all(engine)) <= len(names)
    assert_nothing_is_held(engine)


@depths
@caching
def test_without_room_for_a_sequence_its_tokens_are_computed_again(prefix_caching: bool, async_scheduling: bool) -> None:
    engine = swapping_engine(num_slots=4, prefix_caching=prefix_caching, async_scheduling=async_scheduling)
    assert_right(engine)
    stats = engine.stats()
    assert stats.num_swapped_out_blocks > 0, "short sequences fit"
    assert stats.num_prefill_tokens > sum(map(len, PROMPTS)) or prefix_caching, "long ones do not"


@depths
def test_samples_and_beams_are_swapped_too(async_scheduling: bool) -> None:
    engine = swapping_engine(num_blocks=11, async_scheduling=async_scheduling, max_num_seqs=6)
    sampled = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=9)
    names = {engine.add_request(prompt, sampled).request_id: prompt for prompt in PROMPTS}
    outputs = run_all(engine)
    for name, prompt in names.items():
        assert all(is_possible(prompt, list(sample.token_ids)) for sample in outputs[name].outputs)
    assert engine.stats().num_swapped_in_blocks > 0
    assert_nothing_is_held(engine)

    base: Any = random_gpt2(seed=5, vocab_size=24)
    prompts = [[token % 24 for token in prompt] for prompt in PROMPTS]
    params = BeamSearchParams(3, 8, ignore_eos=True)
    expected = LLM(base, num_blocks=96, block_size=4).beam_search(prompts, params)
    llm = LLM(
        base,
        num_blocks=12,
        block_size=4,
        max_model_len=40,
        swap_space_gib=0.01,
        preemption_mode="swap",
        async_scheduling=async_scheduling,
        check_integrity=True,
    )
    found = llm.beam_search(prompts, params)
    assert [[one.tokens for one in output.sequences] for output in found] == [
        [one.tokens for one in output.sequences] for output in expected
    ]
    assert llm.engine.stats().num_swapped_out_blocks > 0
    assert_nothing_is_held(llm.engine)


def test_a_beam_that_is_preempted_before_its_last_block_was_copied_keeps_its_full_blocks() -> None:
    engine = swapping_engine(prefix_caching=False)
    prompt = PROMPTS[0][:7]
    request = engine.add_request(prompt, BeamSearchParams(2, 6, ignore_eos=True))
    engine.step()
    while not engine.cache_manager._copied:
        engine.step()
    copied = engine.scheduler.running.pop()  # type: ignore[attr-defined]
    num_in_full_blocks = copied.num_scheduled // 4 * 4
    engine.scheduler._preempt(copied)  # type: ignore[attr-defined]
    assert copied.num_swapped_tokens == num_in_full_blocks > 0
    outputs = run_all(engine)[request.request_id].outputs
    assert all(is_possible(prompt, list(found.token_ids)) for found in outputs)
    assert_nothing_is_held(engine)


@depths
@pytest.mark.parametrize("failing", range(1, 24, 2))
def test_after_a_failed_step_what_may_not_have_been_copied_is_computed_again(failing: int, async_scheduling: bool) -> None:
    engine = swapping_engine(async_scheduling=async_scheduling, prefix_caching=False)
    run, count = engine.executor._run, 0  # type: ignore[attr-defined]

    def broken(step: Any) -> Any:
        nonlocal count
        count += 1
        if count == failing:
            raise RuntimeError("broken before a copy was made")
        return run(step)

    engine.executor._run = broken  # type: ignore[attr-defined]
    names = [engine.add_request(prompt, GREEDY).request_id for prompt in PROMPTS]
    outputs: dict[str, Any] = {}
    num_failed = num_steps = 0
    while engine.has_unfinished_requests and (num_steps := num_steps + 1) < 500:
        try:
            outputs.update({delta.request_id: delta.finished for delta in engine.step() if delta.finished is not None})
        except StepError:
            num_failed += 1
    assert num_failed == 1
    for name, prompt in zip(names, PROMPTS, strict=True):
        assert list(outputs[name].outputs[0].token_ids) == continuation(prompt, 12)
    assert engine.stats().num_swapped_out_blocks > 0
    assert_nothing_is_held(engine)


@depths
def test_a_request_that_is_aborted_while_it_is_swapped_gives_its_slots_back(async_scheduling: bool) -> None:
    engine = swapping_engine(async_scheduling=async_scheduling)
    for prompt in PROMPTS:
        engine.add_request(prompt, GREEDY)
    while not (swapped := [seq for seq in engine.scheduler.waiting if seq.num_swapped_tokens]):
        engine.step()
    held = engine.cache_manager.swap_space.num_held
    assert held > 0 and engine.stats().num_swapped == len(swapped)
    for seq in swapped:
        engine.abort(seq.request.request_id)
    assert engine.cache_manager.swap_space.num_held < held
    run_all(engine)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize(("swap_block_s", "swaps"), [(0.001, True), (0.1, False), (None, False)])
def test_a_preempted_sequence_is_swapped_if_that_takes_less_time(swap_block_s: float | None, swaps: bool) -> None:
    engine = swapping_engine(preemption_mode="auto", prefix_caching=False)
    engine._learns_costs = False
    engine.cache_manager.swap_space.costs = PreemptionCosts(swap_block_s, prefill_token_s=0.01)  # 4 tokens a block
    assert_right(engine)
    stats = engine.stats()
    assert stats.num_preemptions > 0 and (stats.num_swapped_out_blocks > 0) == swaps
    assert (stats.num_prefill_tokens > sum(map(len, PROMPTS))) != swaps


def test_what_a_token_costs_is_learned_from_steps_of_prompts() -> None:
    llm = LLM(random_gpt2(seed=5), num_blocks=24, block_size=4, swap_space_gib=0.01)
    costs = llm.engine.cache_manager.swap_space.costs
    assert costs.swap_block_s is not None and costs.swap_block_s > 0, "measured at the start"
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3), use_tqdm=False)
    assert costs.prefill_token_s is None, "three tokens are too few"
    llm.generate([list(range(40))], SamplingParams(max_tokens=3), use_tqdm=False)
    assert costs.prefill_token_s is not None and costs.prefill_token_s > 0
    costs = PreemptionCosts()
    costs.learn(100, 1.0)
    costs.learn(100, 2.0)
    assert costs.prefill_token_s == pytest.approx(0.8 * 0.01 + 0.2 * 0.02)


@depths
@pytest.mark.parametrize("on_kernels", [False, True], ids=["torch", "kernels"])
def test_both_executors_swap(on_kernels: bool, async_scheduling: bool) -> None:
    settings: dict[str, Any] = {
        "block_size": 4,
        "num_blocks": 7,
        "max_model_len": 24,
        "max_num_seqs": 4,
        "swap_space_gib": 0.01,
        "preemption_mode": "swap",
        "prefix_caching": False,
        "async_scheduling": async_scheduling,
    }
    prompts, params = PROMPTS[:3], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    if on_kernels:
        if not async_scheduling:
            pytest.skip("depth 1 is enough in the interpreter")
        from tests.support.full_speed import FullSpeed

        require_kernels(kernel_device())
        base: Any = random_gpt2(torch.float32, seed=5, n_embd=16, n_head=1, n_layer=1)
        engine = FullSpeed(base.to(kernel_device()), **settings).llm.engine
    else:
        base = random_gpt2(seed=5)
        engine = LLM(base, **settings).engine
    names = [engine.add_request(prompt, params).request_id for prompt in prompts]
    outputs = run_all(engine)
    base.to("cpu")
    assert [list(outputs[name].outputs[0].token_ids) for name in names] == [hf_greedy(base, p, 8) for p in prompts]
    assert engine.stats().num_swapped_in_blocks > 0
    assert_nothing_is_held(engine)


def test_a_slot_is_free_after_the_plan_that_reads_it() -> None:
    space = SwapSpace(3, "swap")
    assert space.takes(3, 12) and not space.takes(4, 13) and not space.takes(0, 0)
    space.put(1, [5, 6])
    space.put(2, [7])
    assert space.take_changes() == (((5, 2), (6, 1), (7, 0)), ())
    space.take(1, 1, [9])  # block 0 of the sequence came from the prefix cache
    assert not space.takes(1, 4), "the next plan still reads these slots"
    assert space.take_changes() == ((), ((1, 9),))
    assert space.takes(2, 8) and not space.takes(3, 12)
    space.put(3, [4])
    space.drop(3)
    space.put(4, [8])
    (out, _) = space.take_changes()
    assert len(out) == 1 and out[0][0] == 8, "one plan writes a slot once"
    space._free.append(0)
    with pytest.raises(IntegrityError, match="each of the 3 slots of the swap space must be held or free"):
        space.check_integrity()


def test_settings_that_cannot_be_met_are_refused_by_name() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"swap_space_gib": -1}, "swap_space_gib must be a number, at least 0 and finite, got -1"),
        ({"swap_space_gib": float("nan")}, "swap_space_gib must be a number, at least 0 and finite, got nan"),
        ({"swap_space_gib": True}, "swap_space_gib must be a number"),
        ({"preemption_mode": "sometimes"}, "preemption_mode"),
        ({"preemption_mode": "swap"}, "preemption_mode='swap' needs swap_space_gib > 0"),
    ]
    for settings, message in refused:
        with pytest.raises(ConfigError, match=message):
            PageBrainConfig(**settings)
    base = random_gpt2(seed=5)
    with pytest.raises(ConfigError, match=r"swap_space_gib=1e-09 holds no block of \d+,?\d* bytes"):
        LLM(base, num_blocks=24, swap_space_gib=1e-9)
    with pytest.raises(ConfigError, match="swap_space_gib=1e.09 does not fit: there are .* lower it"):
        LLM(base, num_blocks=24, swap_space_gib=1e9)
    assert LLM(base, num_blocks=24, block_size=4, swap_space=0.001).config.swap_space_gib == 0.001


class PlainScheduler(Scheduler):
    """A scheduler that does not know the swap space."""

    supports = frozenset({"async_scheduling", "prefix_caching", "beam_search"})


def test_with_a_scheduler_that_does_not_know_it_swapping_is_off_and_a_line_says_so() -> None:
    parts = {"scheduler": PlainScheduler}
    llm = LLM(random_gpt2(seed=5), num_blocks=24, swap_space_gib=0.01, preemption_mode="swap", parts=parts)
    assert llm.notices == ("swapping is off: scheduler does not declare support for swapping",)
    assert llm.config.num_swap_blocks == 0
