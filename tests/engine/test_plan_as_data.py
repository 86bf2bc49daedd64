"""A plan says everything that a step changes: another executor that gets the same plans computes the same tokens."""

import pickle
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from pagebrain import LLM, SamplingParams
from pagebrain.attention import KVPool
from pagebrain.cache import NewBlocks
from pagebrain.engine.packed_plan import PlanPacker, PlanUnpacker
from pagebrain.engine.sequence import SequenceGroup
from pagebrain.errors import StepError
from tests.support.hashing import continuation, hash_engine, run_all
from tests.support.kernels import why_no_kernels
from tests.support.models import random_gpt2

PROMPTS = [[1, 2, 3], [7] * 11, [40, 41, 42, 43, 44], list(range(13)), [95]]
SHARED: dict[str, Any] = {"max_tokens": 9, "ignore_eos": True}
PARAMS = [
    SamplingParams(temperature=0, **SHARED),
    SamplingParams(temperature=0.9, seed=3, n=2, **SHARED),
    SamplingParams(temperature=1.1, top_p=0.8, seed=4, frequency_penalty=0.7, **SHARED),
    SamplingParams(temperature=0, prompt_logprobs=1, logprobs=2, **SHARED),
    SamplingParams(temperature=0.9, seed=5, min_tokens=4, stop_token_ids=list(range(0, 96, 5)), max_tokens=9),
]
TIGHT: dict[str, Any] = {"block_size": 4, "num_blocks": 9, "max_num_seqs": 4, "max_num_batched_tokens": 8}
KERNELS = {"attention": "pagebrain.attention.triton_backend:TritonBackend"}


def make(kernels: bool, async_scheduling: bool) -> LLM:
    base: GPT2LMHeadModel
    if kernels:  # in the interpreter, which takes its time
        base = random_gpt2(torch.float32, seed=5, n_layer=1, n_head=1, n_embd=16)
        return LLM(base, async_scheduling=async_scheduling, parts=KERNELS, **(TIGHT | {"num_blocks": 5, "max_num_seqs": 2}))
    return LLM(random_gpt2(seed=5), async_scheduling=async_scheduling, **TIGHT)


def record(llm: LLM) -> tuple[list[bytes], list[Any], list[SequenceGroup]]:
    """Serve all prompts. Returns the packed plans, what each brought, and the groups."""
    packer = PlanPacker()
    packed: list[bytes] = []
    results: list[Any] = []
    groups: list[SequenceGroup] = []
    executor: Any = llm.engine.executor
    launch = executor.launch

    def noted(group: SequenceGroup) -> Any:
        packed.append(pickle.dumps(packer.pack(group)))
        groups.append(group)
        in_flight = launch(group)
        number, wait = len(results), in_flight.wait
        results.append(None)

        def noted_wait() -> Any:
            results[number] = wait()
            return results[number]

        object.__setattr__(in_flight, "wait", noted_wait)
        return in_flight

    executor.launch = noted
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    return packed, results, groups


@pytest.mark.parametrize(
    ("kernels", "async_scheduling"),
    [(False, False), (False, True), (True, True)],
    ids=["torch", "torch, ahead", "batch rows, ahead"],
)
def test_a_replay_of_packed_plans_brings_the_same_tokens(kernels: bool, async_scheduling: bool) -> None:
    if kernels and (reason := why_no_kernels("cpu")) is not None:
        pytest.skip(reason)
    plans, results, groups = record(make(kernels, async_scheduling))
    assert any(group.released for group in groups) and all(result is not None for result in results)

    second: Any = make(kernels, async_scheduling=False).engine.executor
    unpacker = PlanUnpacker()
    for plan, result in zip(plans, results, strict=True):
        replayed = second.launch(unpacker.unpack(pickle.loads(plan))).wait()
        assert replayed == result


def test_a_plan_is_small() -> None:
    """What is the same in every step is not sent again: a decode takes a few bytes a sequence."""
    plans, _, groups = record(make(kernels=False, async_scheduling=False))
    decodes = [
        len(plan)
        for plan, group in zip(plans, groups, strict=True)
        if not (group.released or group.new_blocks) and all(entry.num_tokens == 1 for entry in group)
    ]
    assert decodes and max(decodes) < 200
    assert b"Sequence" not in min(plans, key=len) and b"Request" not in b"".join(plans)


def test_new_blocks_are_told_once_and_by_column() -> None:
    engine = hash_engine(block_size=2, num_blocks=16, max_model_len=20)
    groups: list[SequenceGroup] = []
    launch = engine.executor.launch

    def noted(group: SequenceGroup) -> Any:
        groups.append(group)
        return launch(group)

    engine.executor.launch = noted  # type: ignore[method-assign]
    engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=6))
    run_all(engine)
    told = [[(first, len(ids)) for _, first, ids in group.new_blocks] for group in groups]
    assert told == [[(0, 2)], [], [(2, 1)], [], [(3, 1)], []]  # contexts of 3, 4, 5, 6, 7 and 8 tokens in blocks of 2
    assert [group.released for group in groups] == [()] * 6
    engine.add_request([4], SamplingParams(temperature=0, max_tokens=2))
    run_all(engine)
    assert groups[6].released == (0,)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_after_a_plan_of_which_half_was_applied_the_next_tells_all_anew(async_scheduling: bool) -> None:
    """Interrupted while it applies a plan, an executor may know some of it; it drops what it has and takes all again."""
    engine = hash_engine(async_scheduling=async_scheduling, block_size=2, num_blocks=12, max_model_len=20)
    executor: Any = engine.executor
    apply, calls = executor.rows.apply, 0

    def interrupted(group: SequenceGroup) -> None:
        nonlocal calls
        calls += 1
        if calls % 4 == 3:
            apply(SequenceGroup(group.scheduled, released=group.released[:1], new_blocks=group.new_blocks[:1]))
            raise MemoryError("no room")
        apply(group)

    executor.rows.apply = interrupted
    prompts = {"a": [1], "b": [2, 3, 4], "c": [5] * 6, "d": [6]}
    for name, prompt in prompts.items():
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=12), name)
    finished: dict[str, Any] = {}
    failures = 0
    for _ in range(200):
        try:
            finished.update((delta.request_id, delta.finished) for delta in engine.step() if delta.finished is not None)
        except StepError:
            failures += 1
        if not engine.has_unfinished_requests:
            break
    assert failures > 5 and set(finished) == set(prompts)
    for name, prompt in prompts.items():
        assert list(finished[name].outputs[0].token_ids) == continuation(prompt, 12)
    executor.rows.apply = apply
    executor.rows.apply(SequenceGroup(()).with_changes(engine.cache_manager.take_changes()))
    assert not executor.rows.tables.by_id and len(executor.rows._free) == executor.rows.num_rows


def test_blocks_are_copied_in_all_layers_before_the_step_is_computed() -> None:
    config: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 3, "dtype": torch.float64, "device": "cpu"}
    pool = KVPool(num_blocks=5, block_size=4, **config)
    for layer, tensor in enumerate((*pool.key_pools, *pool.value_pools)):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1000 * layer)
    before = [tensor.clone() for tensor in (*pool.key_pools, *pool.value_pools)]
    pool.copy_blocks([(0, 3), (4, 1)])
    for tensor, was in zip((*pool.key_pools, *pool.value_pools), before, strict=True):
        assert torch.equal(tensor[[0, 2, 4, 5]], was[[0, 2, 4, 5]])
        assert torch.equal(tensor[3], was[0]) and torch.equal(tensor[1], was[4])


def test_a_plan_may_move_a_sequence_to_other_blocks() -> None:
    """Every block of a running sequence is copied and its table written anew: the text goes on as it was."""
    engine = hash_engine(block_size=2, num_blocks=16, max_model_len=20)
    launch, moved = engine.executor.launch, 0

    def moving(group: SequenceGroup) -> Any:
        nonlocal moved
        (entry,) = group
        table = engine.cache_manager.block_table(entry.seq.seq_id)
        if entry.start == 5:
            others = tuple(15 - block_id for block_id in table)
            copies = tuple(zip(table, others, strict=True))
            blocks = (NewBlocks(entry.seq.seq_id, 0, others),)
            group = SequenceGroup(group.scheduled, new_blocks=blocks, copied_blocks=copies)
            moved += 1
        return launch(group)

    engine.executor.launch = moving  # type: ignore[method-assign]
    engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=4))
    output = run_all(engine)["request-0"].outputs[0]
    assert moved == 1 and list(output.token_ids) == continuation([1, 2, 3], 4)
