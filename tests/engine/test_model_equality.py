"""The paged GPT-2 gives the logits of vanilla Hugging Face GPT-2: any shape, any flags, in one piece or in chunks."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagebrain.block import BlockManager
from pagebrain.cache import CacheManager
from pagebrain.config import PageBrainConfig
from pagebrain.errors import ConfigError, InvalidRequestError, OutOfBlocksError
from pagebrain.models.gpt2 import PagedGPT2LMHeadModel
from tests.support.models import hf_greedy, hf_logits, random_gpt2
from tests.support.paged import paged, pairs, run_in_chunks


@st.composite
def models(draw: Any) -> dict[str, Any]:
    n_head = draw(st.integers(1, 4))
    return {
        "n_head": n_head,
        "n_embd": n_head * draw(st.sampled_from([2, 8, 16])),
        "n_layer": draw(st.integers(1, 4)),
        "n_inner": draw(st.sampled_from([None, 24])),
        "activation_function": draw(st.sampled_from(["gelu_new", "relu", "gelu", "silu"])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-2])),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "reorder_and_upcast_attn": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@st.composite
def ragged(draw: Any) -> tuple[list[list[int]], list[list[int]]]:
    """One to four sequences and how each is cut into pieces."""
    sequences = draw(st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=30), min_size=1, max_size=4))
    cuts = []
    for sequence in sequences:
        left, pieces = len(sequence), []
        while left:
            pieces.append(draw(st.integers(1, left)))
            left -= pieces[-1]
        cuts.append(pieces)
    return sequences, cuts


@settings(max_examples=80, deadline=None)
@given(shape=models(), batch=ragged(), block_size=st.sampled_from([1, 2, 4, 16]), shuffle=st.integers(0, 100))
def test_logits_equal_hugging_face_for_random_models(
    shape: dict[str, Any], batch: tuple[list[list[int]], list[list[int]]], block_size: int, shuffle: int
) -> None:
    # Where this flag is set Hugging Face computes attention in float32 and refuses a float64 model.
    exact = not shape["reorder_and_upcast_attn"]
    dtype, tolerance = (torch.float64, 1e-9) if exact else (torch.float32, 1e-4)
    base = random_gpt2(dtype, **shape)
    sequences, cuts = batch
    model = paged(base, shuffle, block_size=block_size, num_blocks=4 * 32 // block_size)
    for logits, sequence in zip(run_in_chunks(model, sequences, cuts), sequences, strict=True):
        torch.testing.assert_close(logits, hf_logits(base, sequence), atol=tolerance, rtol=0)
    model.cache_manager.check_integrity()


@pytest.mark.parametrize("flag", ["scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"])
def test_each_attention_flag_is_honoured(flag: str) -> None:
    """With the flag the other way round the logits must differ, or the test above would not see a flag that is ignored."""
    sequence = list(range(30))
    plain = random_gpt2(torch.float32)
    flipped = random_gpt2(torch.float32, **{flag: not getattr(plain.config, flag)})
    logits = run_in_chunks(paged(flipped, num_blocks=8), [sequence], [[30]])[0]
    torch.testing.assert_close(logits, hf_logits(flipped, sequence), atol=1e-4, rtol=0)
    if flag != "reorder_and_upcast_attn":  # which changes rounding only
        assert (logits - hf_logits(plain, sequence)).abs().max() > 1e-3


def test_weights_are_shared_with_the_base_model() -> None:
    base = random_gpt2()
    model = paged(base, num_blocks=8)
    ours, theirs = ({p.data_ptr() for p in module.parameters()} for module in (model, base))
    assert ours == theirs


def test_greedy_decoding_through_the_adapter_equals_hugging_face() -> None:
    base = random_gpt2(seed=3)
    model = paged(base, block_size=4, num_blocks=24)
    prompts = [[5, 6, 7], [9] * 11]
    input_ids = torch.tensor([prompts[0] + [0] * 8, prompts[1]])
    counts = [3, 11]
    logits = model(input_ids, input_pos=pairs((0, 3), (0, 11)), cache_pos=pairs((0, 0), (0, 0))).logits
    tokens = [[int(logits[b, counts[b] - 1].argmax())] for b in range(2)]
    for _ in range(19):
        step = torch.tensor([[row[-1]] for row in tokens])
        logits = model(step, input_pos=pairs(*((c, 1) for c in counts)), cache_pos=pairs(*((0, c) for c in counts))).logits
        counts = [count + 1 for count in counts]
        for row, scores in zip(tokens, logits[:, 0], strict=True):
            row.append(int(scores.argmax()))
    assert tokens == [hf_greedy(base, prompt, 20) for prompt in prompts]


def test_starting_a_row_afresh_frees_what_it_held() -> None:
    base = random_gpt2()
    model = paged(base, block_size=4, num_blocks=6)
    for length in (24, 9, 24):  # would not fit side by side
        sequence = list(range(length))
        logits = model(torch.tensor([sequence]), input_pos=pairs((0, length)), cache_pos=pairs((0, 0))).logits[0]
        torch.testing.assert_close(logits, hf_logits(base, sequence), atol=1e-9, rtol=0)
        assert len(model.cache_manager.block_table(0)) == -(-length // 4)
        model.cache_manager.check_integrity()


BAD_CALLS: dict[str, tuple[Any, Any, Any, str]] = {
    "cache does not start at 0": ([[1, 2]], (4, 2), (1, 4), "starts at position 1"),
    "start is not the cached count": ([[1, 2]], (3, 2), (0, 4), "starts at 3, but 4 tokens are cached"),
    "more cached than there is": ([[1, 2]], (9, 2), (0, 9), "claims 9 cached tokens, but sequence 0 has 4"),
    "no new token": ([[1, 2]], (4, 0), (0, 4), "names 0 new tokens"),
    "wider than the row": ([[1, 2]], (4, 3), (0, 4), "names 3 new tokens"),
    "token out of range": ([[1, 97]], (4, 2), (0, 4), "outside 0..96"),
    "negative token": ([[-1, 1]], (4, 2), (0, 4), "outside 0..96"),
    "past the last position": ([[1] * 61], (4, 61), (0, 4), "would reach position 64"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_says_what_is_wrong_and_changes_nothing(name: str) -> None:
    input_ids, input_pos, cache_pos, message = BAD_CALLS[name]
    base = random_gpt2()
    model = paged(base, block_size=4, num_blocks=20)
    model(torch.tensor([[1, 2, 3, 4]]), input_pos=pairs((0, 4)), cache_pos=pairs((0, 0)))
    table, pool = model.cache_manager.block_table(0), model.cache_manager.pool.key_pools[0].clone()
    with pytest.raises(InvalidRequestError, match=message):
        model(torch.tensor(input_ids), input_pos=pairs(input_pos), cache_pos=pairs(cache_pos))
    assert model.cache_manager.block_table(0) == table and torch.equal(model.cache_manager.pool.key_pools[0], pool)
    after = model(torch.tensor([[5]]), input_pos=pairs((4, 1)), cache_pos=pairs((0, 4))).logits[0]
    torch.testing.assert_close(after, hf_logits(base, [1, 2, 3, 4, 5])[-1:], atol=1e-9, rtol=0)


def test_a_sequence_whose_blocks_were_freed_elsewhere_cannot_go_on() -> None:
    model = paged(random_gpt2(), block_size=4, num_blocks=20)
    model(torch.tensor([[1, 2, 3, 4]]), input_pos=pairs((0, 4)), cache_pos=pairs((0, 0)))
    model.cache_manager.free(0)
    with pytest.raises(InvalidRequestError, match="claims 4 cached tokens, but sequence 0 has 0"):
        model(torch.tensor([[5]]), input_pos=pairs((4, 1)), cache_pos=pairs((0, 4)))


def test_after_a_call_that_failed_a_sequence_has_to_start_afresh() -> None:
    base = random_gpt2()
    model = paged(base, block_size=4, num_blocks=20)
    first = {"input_pos": pairs((0, 4)), "cache_pos": pairs((0, 0))}
    model(torch.tensor([[1, 2, 3, 4]]), **first)
    forward = model.forward_tokens
    model.forward_tokens = lambda batch: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(ZeroDivisionError):
        model(torch.tensor([[9, 9]]), input_pos=pairs((4, 2)), cache_pos=pairs((0, 4)))
    model.forward_tokens = forward  # type: ignore[method-assign]
    with pytest.raises(InvalidRequestError, match="claims 4 cached tokens, but sequence 0 has 0"):
        model(torch.tensor([[5]]), input_pos=pairs((4, 1)), cache_pos=pairs((0, 4)))
    logits = model(torch.tensor([[1, 2, 3, 4]]), **first).logits[0]
    torch.testing.assert_close(logits, hf_logits(base, [1, 2, 3, 4]), atol=1e-9, rtol=0)


def test_sequence_ids_may_be_a_tensor() -> None:
    base = random_gpt2()
    model = paged(base, num_blocks=8)
    model(torch.tensor([[1, 2]]), input_pos=pairs((0, 2)), cache_pos=pairs((0, 0)), seq_ids=torch.tensor([5]))
    logits = model(torch.tensor([[3]]), input_pos=pairs((2, 1)), cache_pos=pairs((0, 2)), seq_ids=[5]).logits[0]
    torch.testing.assert_close(logits, hf_logits(base, [1, 2, 3])[-1:], atol=1e-9, rtol=0)


def test_too_few_blocks_for_all_rows_changes_nothing() -> None:
    base = random_gpt2()
    model = paged(base, block_size=4, num_blocks=4)
    model(torch.tensor([[1, 2, 3, 4]]), input_pos=pairs((0, 4)), cache_pos=pairs((0, 0)))
    ids = torch.zeros(2, 10, dtype=torch.int64)
    with pytest.raises(OutOfBlocksError, match="6 blocks are needed"):
        model(ids, input_pos=pairs((0, 10), (0, 10)), cache_pos=pairs((0, 0), (0, 0)))
    assert model.cache_manager.num_free_blocks == 3 and len(model.cache_manager.block_table(0)) == 1
    model.cache_manager.check_integrity()


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    model = paged(random_gpt2(), num_blocks=4)
    ids = torch.ones(2, 3, dtype=torch.int64)
    good = pairs((0, 3), (0, 3)), pairs((0, 0), (0, 0))
    with pytest.raises(InvalidRequestError, match=r"input_ids must be integers \[B, T\]"):
        model(ids[0], input_pos=good[0], cache_pos=good[1])
    with pytest.raises(InvalidRequestError, match=r"input_pos must be an integer tensor \[2, 2\]"):
        model(ids, input_pos=good[0][:1], cache_pos=good[1])
    with pytest.raises(InvalidRequestError, match="seq_ids must name 2 different sequences"):
        model(ids, input_pos=good[0], cache_pos=good[1], seq_ids=[4, 4])
    with pytest.raises(InvalidRequestError, match="cache_pos must be an integer tensor"):
        model(ids, input_pos=good[0], cache_pos=good[1].double())


@pytest.mark.parametrize("other", [{"n_layer": 3}, {"n_head": 2}, {"n_embd": 96}, {"dtype": torch.float32}])
def test_a_cache_made_for_another_model_is_refused(other: dict[str, Any]) -> None:
    config = PageBrainConfig.for_model(random_gpt2(**other), num_blocks=4)
    with pytest.raises(ConfigError, match="make both from the same"):
        PagedGPT2LMHeadModel(random_gpt2(), CacheManager(BlockManager(config), config))
