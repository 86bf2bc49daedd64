"""How decode attention is cut into programs."""

import pytest

from pagebrain.kernels.decode_plan import MAX_SPLITS, DecodeTiling, choose_num_splits

H200_SMS = 132
GPT2 = DecodeTiling.for_shape(64, 2, 1)


def test_gpt2_in_bfloat16_is_read_by_one_warp_sixteen_tokens_at_a_time() -> None:
    assert GPT2 == DecodeTiling(tile=16, num_warps=1, num_stages=1, unroll=1)


@pytest.mark.parametrize("padded_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("group", [1, 4])
def test_tiles_are_powers_of_two_and_tensor_cores_get_sixteen_tokens(padded_dim: int, itemsize: int, group: int) -> None:
    tile = DecodeTiling.for_shape(padded_dim, itemsize, group).tile
    assert tile & (tile - 1) == 0 and tile >= (16 if group > 1 else 4)


@pytest.mark.parametrize(
    ("num_seqs", "num_splits"), [(1, 32), (8, 32), (32, 8), (64, 4), (128, 2), (255, 1), (256, 1), (4096, 1)]
)
def test_an_h200_gets_about_as_many_programs_as_it_can_hold(num_seqs: int, num_splits: int) -> None:
    """GPT-2 small at 1024 tokens. At 64 and 256 sequences these are the splits that were fastest there."""
    assert choose_num_splits(12 * num_seqs, 1024, H200_SMS, GPT2) == num_splits


@pytest.mark.parametrize(("max_context_len", "num_splits"), [(0, 1), (16, 1), (63, 1), (64, 2), (512, 16), (4096, 32)])
def test_a_short_table_is_not_cut_into_splits_that_read_nothing(max_context_len: int, num_splits: int) -> None:
    assert choose_num_splits(12, max_context_len, H200_SMS, GPT2) == num_splits


def test_any_input_gives_a_usable_number() -> None:
    for num_contexts in (0, 1, 7, 100, 10**6):
        for max_context_len in (0, 1, 100, 10**6):
            num_splits = choose_num_splits(num_contexts, max_context_len, 1, GPT2)
            assert 1 <= num_splits <= MAX_SPLITS
