"""Batch rows, padding and launching ahead: what comes out is what the engine without them gives, and only changes travel.

In Triton's interpreter a step is computed launch by launch where a GPU replays a graph; buffers, padding and rows are the
same.
"""

from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from pagebrain import LLM, SamplingParams
from pagebrain.errors import StepError
from tests.support.kernels import require_kernels
from tests.support.models import POISON, hf_greedy, random_gpt2

PROMPTS = [[1, 2, 3, 4, 5], [7] * 7, [40], [9, 8, 7]]
GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
ROOMY: dict[str, Any] = {"block_size": 8, "num_blocks": 32, "max_num_seqs": 6, "max_num_batched_tokens": 6}
TIGHT: dict[str, Any] = {"block_size": 8, "num_blocks": 3, "max_num_seqs": 3, "max_num_batched_tokens": 6}
SAMPLED = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=1.3, top_p=0.7, seed=2, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=0.9, top_k=5, min_p=0.01, seed=4, max_tokens=7, ignore_eos=True),
]
SPECIAL = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=7, ignore_eos=True, repetition_penalty=1.5, logprobs=2),
    SamplingParams(temperature=0, max_tokens=7, logit_bias={5: 3.0}, prompt_logprobs=1),
    SamplingParams(temperature=0, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=4, max_tokens=7, min_tokens=5, stop_token_ids=tuple(range(0, 96, 2))),
]


def full_speed(device: str, num_layers: int = 1, **settings: Any) -> Any:
    from tests.support.full_speed import FullSpeed

    require_kernels(device)
    return FullSpeed(small(device, num_layers), **settings)


def small(device: str, num_layers: int = 1) -> GPT2LMHeadModel:
    """One layer, unless layers are what a test is about: interpreted kernels take long. ``test_engine.py`` has more."""
    base: Any = random_gpt2(torch.float32, seed=3, n_layer=num_layers, n_head=2)
    moved: GPT2LMHeadModel = base.to(device)
    return moved


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("settings", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_sampled_tokens_are_those_of_the_sampler(settings: dict[str, Any], async_scheduling: bool, device: str) -> None:
    """Greedy, sampled and special requests beside each other, against the engine in torch operations on the CPU."""
    from tests.support.full_speed import num_preemptions, token_lists

    plain = LLM(small("cpu"), num_blocks=32, block_size=8)
    engine = full_speed(device, async_scheduling=async_scheduling, **settings)
    for params in (SAMPLED, SPECIAL):
        expected = plain.generate(PROMPTS, params, use_tqdm=False)
        engine.traces.clear()
        outputs = engine.generate(PROMPTS, params)
        assert token_lists(outputs) == token_lists(expected)
        assert engine.num_mixed > 0 and (num_preemptions(outputs) > 0) == (settings is TIGHT)
        for ours, theirs in zip(outputs, expected, strict=True):
            assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
            for entry, wanted in zip(ours.prompt_logprobs or (), theirs.prompt_logprobs or (), strict=True):
                assert entry is wanted is None or abs(entry.logprob - wanted.logprob) < 1e-4  # type: ignore[union-attr]
            for entry, wanted in zip(ours.outputs[0].logprobs or (), theirs.outputs[0].logprobs or (), strict=True):
                assert (entry.token_id, entry.rank) == (wanted.token_id, wanted.rank)
                assert abs(entry.logprob - wanted.logprob) < 1e-4


def test_a_full_context_is_scored(device: str) -> None:
    """Nothing follows the last position: what is sampled there has no place in the rows, by kernel or by sampler."""
    ids = [[7, 3, 1, 9, 4, 2, 8, first] for first in range(3)]
    params = [SamplingParams(max_tokens=0, prompt_logprobs=1), SamplingParams(max_tokens=0)]
    params.append(SamplingParams(max_tokens=0, logprobs=1))
    expected = LLM(small("cpu"), num_blocks=3, block_size=8, max_model_len=8).generate(ids, params, use_tqdm=False)
    settings: dict[str, Any] = {"block_size": 8, "num_blocks": 3, "max_num_seqs": 3, "max_model_len": 8}
    engine = full_speed(device, max_num_batched_tokens=24, **settings)
    rows = engine.executor.rows.token_ids
    outputs = engine.generate(ids, params)
    assert {output.outputs[0].token_ids for output in outputs} == {()}
    assert rows.shape[1] == 8 and sorted(rows[:-1].tolist())[-3:] == sorted(ids), "a token was written elsewhere"
    for got, wanted in zip(outputs[0].prompt_logprobs or (), expected[0].prompt_logprobs or (), strict=True):
        assert got is wanted is None or abs(got.logprob - wanted.logprob) < 1e-4  # type: ignore[union-attr]


def test_only_what_the_host_decides_travels(device: str) -> None:
    """A new sequence's tokens and parameters, and a block now and then; nothing for a token that the step itself makes."""
    engine = full_speed(device, block_size=8, num_blocks=16, max_num_seqs=2)
    words: list[int] = []
    upload = engine.executor.rows.upload

    def noted() -> int:
        words.append(upload())
        return words[-1]

    engine.executor.rows.upload = noted
    outputs = engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    assert len(outputs[0].outputs[0].token_ids) == 20
    first, *others = words
    assert first >= 3 + 1  # the prompt and a block at least
    # 22 tokens are computed; blocks begin at positions 8 and 16, which are those of steps 6 and 14
    assert [index for index, count in enumerate(words) if count and index] == [6, 14]
    assert set(others) == {0, 1}


def test_padding_touches_nobodys_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences in a bucket of four, their prompts in one of 64 tokens: else only the dummy block is written."""
    from pagebrain.worker.graphs import ChunkGraphs

    monkeypatch.setattr(ChunkGraphs, "is_captured", True)
    engine = full_speed(device, num_layers=2, block_size=8, num_blocks=16, max_num_seqs=6)
    cache = engine.llm.engine.cache_manager.pool
    for pool in (*cache.key_pools, *cache.value_pools):
        pool[cache.dummy_block].fill_(POISON)  # again: the warm-up has been there
    before = [pool.clone() for pool in (*cache.key_pools, *cache.value_pools)]
    assert engine.executor.decodes.sizes == (1, 2, 4, 6)
    engine.generate(PROMPTS[:3], GREEDY)
    assert engine.num_chunk_graphs == 1
    used = {block for trace in engine.traces for table in trace.block_tables.values() for block in table}
    assert cache.dummy_block == 16 and 16 not in used and len(used) < 16
    for pool, was in zip((*cache.key_pools, *cache.value_pools), before, strict=True):
        untouched = [block for block in range(16) if block not in used]
        assert torch.equal(pool[untouched], was[untouched])
    changed = [not torch.equal(pool[16], was[16]) for pool, was in zip(cache.key_pools, before, strict=False)]
    assert all(changed)  # the padding went somewhere


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("settings", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_chunks_that_are_padded_for_a_graph_bring_the_same_tokens(
    settings: dict[str, Any], async_scheduling: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding reads and writes nothing but the dummy's, and what a graph cannot compute goes its own way."""
    from pagebrain.worker.graphs import ChunkGraphs
    from tests.support.full_speed import num_preemptions, token_lists

    monkeypatch.setattr(ChunkGraphs, "is_captured", True)  # where nothing is recorded, it is computed launch by launch
    monkeypatch.setattr("pagebrain.worker.graphs.chunk_sizes", lambda max_num_tokens: (4, 16))
    sizes: list[tuple[int, int]] = []
    run = ChunkGraphs.run

    def noted(self: Any, row_numbers: Any, lengths: Any, positions: Any, *rest: Any) -> Any:
        sizes.append((len(lengths), len(positions)))
        return run(self, row_numbers, lengths, positions, *rest)

    monkeypatch.setattr(ChunkGraphs, "run", noted)
    engine = full_speed(device, async_scheduling=async_scheduling, **settings)
    plain = LLM(small("cpu"), **settings)
    for params in ([GREEDY] * len(PROMPTS), SAMPLED, SPECIAL):
        engine.executor.rows._free.reverse()  # so that row 0 is in use, and padding in it is seen
        sizes.clear()
        outputs = engine.generate(PROMPTS, params)
        expected = plain.generate(PROMPTS, params, use_tqdm=False)
        assert token_lists(outputs) == token_lists(expected)
        assert (num_preemptions(outputs) > 0) == (settings is TIGHT)
        if params is SAMPLED:
            assert {num_tokens for _, num_tokens in sizes} >= {5, 6} and any(count > 1 for count, _ in sizes)


def test_a_larger_step_than_any_graph_is_launched_as_it_is(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagebrain.worker.graphs import MAX_CHUNKS, ChunkGraphs
    from tests.support.full_speed import token_lists

    monkeypatch.setattr(ChunkGraphs, "is_captured", True)
    monkeypatch.setattr("pagebrain.worker.graphs.chunk_sizes", lambda max_num_tokens: (4,))
    engine = full_speed(device, block_size=8, num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64)
    chunks = engine.executor.chunks
    assert (
        chunks.has_room_for(MAX_CHUNKS, 4) and not chunks.has_room_for(MAX_CHUNKS + 1, 4) and not chunks.has_room_for(1, 5)
    )
    assert token_lists(engine.generate(PROMPTS, GREEDY)) == [hf_greedy(small("cpu"), prompt, 7) for prompt in PROMPTS]
    assert engine.num_chunk_graphs == 0
    assert token_lists(engine.generate(PROMPTS[3:], GREEDY)) == [hf_greedy(small("cpu"), PROMPTS[3], 7)]
    assert engine.num_chunk_graphs == 1


def test_chunk_sizes_fit_the_largest_step() -> None:
    require_kernels_anywhere()
    from pagebrain.worker.graphs import chunk_sizes

    assert chunk_sizes(16384) == (64, 128, 256, 512, 1024, 2048)
    assert chunk_sizes(300) == (64, 128, 256) and chunk_sizes(7) == (8,) and chunk_sizes(6) == (6,)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_step_that_cannot_be_launched_is_tried_again(async_scheduling: bool, device: str) -> None:
    from tests.support.full_speed import token_lists

    engine = full_speed(device, async_scheduling=async_scheduling, **TIGHT)
    base = small("cpu")
    model, chunks, calls = engine.executor.model, engine.executor.chunks, 0

    def failing(compute: Any) -> Any:
        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls in (3, 6, 7):
                raise RuntimeError("out of luck")
            return compute(*args)

        return counted

    model.forward_tokens, chunks.run = failing(model.forward_tokens), failing(chunks.run)
    inner = engine.llm.engine
    failures = 0
    for prompt in PROMPTS:
        inner.add_request(prompt, GREEDY)
    finished = {}
    while inner.has_unfinished_requests:
        try:
            deltas = inner.step()
        except StepError:
            failures += 1
            continue
        finished.update({delta.request_id: delta.finished for delta in deltas if delta.finished is not None})
    tokens = token_lists([finished[name] for name in sorted(finished)])
    assert tokens == [hf_greedy(base, prompt, 7) for prompt in PROMPTS]
    # On a GPU decodes are replayed and call nothing, so that fewer calls are seen.
    assert failures >= 1 and inner.cache_manager.num_free_blocks == 3


def test_every_array_that_is_sent_begins_where_the_kernels_were_compiled_for(device: str) -> None:
    """An address that is no multiple of 16 would be another kernel to Triton, compiled while a request waits for it."""
    require_kernels(device)
    import numpy as np

    from pagebrain.worker.batch_rows import send_together

    arrays = [np.arange(length) + 10 * length for length in (3, 1, 4, 0, 5, 2)]
    sent = send_together(arrays, torch.device(device))
    assert [tensor.tolist() for tensor in sent] == [array.tolist() for array in arrays]
    assert all((tensor.data_ptr() - sent[0].data_ptr()) % 16 == 0 for tensor in sent if len(tensor))


def test_nothing_of_a_request_is_compiled_late(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that requests of every kind launch have been launched before, with arguments of the same kinds."""
    require_kernels(device)
    from pagebrain.kernels import decode
    from tests.support.launches import noted_launches

    if device == "cpu":  # a machine with so few multiprocessors that the number of sequences decides about splits
        monkeypatch.setattr(decode, "num_multiprocessors", lambda device: 1)
        monkeypatch.setattr(decode, "choose_num_splits", lambda contexts, *rest: max(1, 16 // contexts))
    with noted_launches(monkeypatch) as before:
        engine = full_speed(device, num_layers=2, async_scheduling=True, **ROOMY)
    with noted_launches(monkeypatch) as after:
        engine.generate(PROMPTS, SAMPLED)
        engine.generate(PROMPTS, SPECIAL)
        engine.generate([[5], *PROMPTS], [SPECIAL[0], *SAMPLED])
    assert after and after <= before, f"compiled late: {sorted(after - before)}"
    splits = {value for _, _, settings in before for name, value in settings if name == "PADDED_SPLITS"}
    assert len(splits) > 1 or device == "cuda"


def test_a_sequence_may_fit_into_one_block(device: str) -> None:
    from tests.support.full_speed import token_lists

    engine = full_speed(device, block_size=64, num_blocks=4, max_num_seqs=4)
    assert engine.executor.rows.block_tables.shape == (2 * 4 + 1, 1)
    assert token_lists(engine.generate(PROMPTS, GREEDY)) == [hf_greedy(small("cpu"), prompt, 7) for prompt in PROMPTS]


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_an_interrupt_while_a_step_is_launched_costs_nobody_a_token(async_scheduling: bool, device: str) -> None:
    """The device has taken the step, the engine has not: the next step must not skip a token."""
    params = SamplingParams(temperature=2.0, seed=5, max_tokens=12, ignore_eos=True)
    alone = LLM(small("cpu"), num_blocks=32, block_size=8).generate([PROMPTS[3]], params, use_tqdm=False)
    expected = list(alone[0].outputs[0].token_ids)
    assert len(set(expected)) > 6
    engine = full_speed(device, async_scheduling=async_scheduling, block_size=8, num_blocks=32, max_num_seqs=2)
    dropped, kept = engine.llm.stream(PROMPTS[0], params), engine.llm.stream(PROMPTS[3], params)
    tokens: list[int] = []
    for _ in range(3):
        next(dropped)
        tokens += next(kept).token_ids
    launch = engine.executor.launch

    def interrupted(group: Any) -> Any:
        launch(group)
        raise KeyboardInterrupt

    engine.executor.launch = interrupted
    with pytest.raises(KeyboardInterrupt):
        for _ in dropped:
            pass
    engine.executor.launch = launch
    for delta in kept:
        tokens += delta.token_ids
    assert tokens == expected


def test_a_sequence_that_ended_keeps_its_row_while_another_takes_its_seat(device: str) -> None:
    """So there are twice as many rows as seats: with every token an end, each sequence ends in mid-flight."""
    from tests.support.full_speed import token_lists

    engine = full_speed(device, async_scheduling=True, block_size=8, num_blocks=32, max_num_seqs=1, max_num_batched_tokens=8)
    ends = SamplingParams(temperature=0, max_tokens=9, stop_token_ids=tuple(range(96)))
    tokens = token_lists(engine.generate(PROMPTS, ends))
    assert [len(each) for each in tokens] == [1] * len(PROMPTS)


def test_kernels_that_are_named_where_they_cannot_run_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_kernels_anywhere()
    from pagebrain.errors import ConfigError
    from pagebrain.kernels import common
    from tests.support.full_speed import KERNELS

    monkeypatch.setattr(common, "is_interpreted", lambda: False)
    with pytest.raises(ConfigError, match="compiled for a GPU: use device='cuda', or set TRITON_INTERPRET=1"):
        LLM(small("cpu"), num_blocks=8, parts=KERNELS)


def test_more_sequences_than_a_launch_takes_are_refused_in_one_line(device: str) -> None:
    from pagebrain.errors import ConfigError
    from tests.support.full_speed import KERNELS

    with pytest.raises(ConfigError, match="max_num_seqs must be at most 65535 with the Triton kernels, got 65536"):
        LLM(small(device), num_blocks=8, max_num_seqs=65_536, parts=KERNELS)


def test_rows_are_used_again(device: str) -> None:
    engine = full_speed(device, **ROOMY | {"max_num_seqs": 2})
    rows = engine.executor.rows
    for _ in range(2):  # eight sequences
        engine.generate(PROMPTS, SPECIAL)
    assert sorted(rows._free) == list(range(rows.num_rows - 1)) and rows.num_rows == 2 * 2 + 1


def test_bucket_sizes_are_few_and_end_with_the_largest_batch() -> None:
    require_kernels_anywhere()
    from pagebrain.worker.graphs import bucket_sizes

    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(6) == (1, 2, 4, 6)
    sizes = bucket_sizes(256)
    assert sizes[:7] == (1, 2, 4, 8, 16, 32, 64) and sizes[-1] == 256 and len(sizes) <= 14
    assert all(later <= 2 * earlier for earlier, later in zip(sizes, sizes[1:]))
    assert all(later <= 1.5 * earlier for earlier, later in zip(sizes[6:], sizes[7:]))


def require_kernels_anywhere() -> None:
    from tests.support.kernels import why_no_kernels

    reasons = [why_no_kernels(device) for device in ("cpu", "cuda")]
    if all(reasons):
        pytest.skip(str(reasons[0]))
