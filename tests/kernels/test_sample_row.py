"""What the sampling kernels compute for a token: the same random bits as torch's operations, ranks in order, exact races."""

import math
import random
from typing import Any

import pytest
import torch

from pagebrain.sampling import random_bits
from pagebrain.sampling.ranking import best_tokens

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from pagebrain.kernels.sample_limits import end_of_best, end_of_min_p, halfway  # noqa: E402
from pagebrain.kernels.sample_row import distances_from, race, random_words, ranks_of, row_key  # noqa: E402


@triton.jit
def words_kernel(out_ptr, keys_ptr, positions_ptr, vocab_size, TILE: tl.constexpr):
    row = tl.program_id(0)
    key_low, key_high = row_key(tl.load(keys_ptr + row), tl.load(positions_ptr + row))
    tokens = tl.arange(0, TILE)
    words = random_words(key_low, key_high, tokens)
    tl.store(out_ptr + row * vocab_size + tokens, words.to(tl.int64), mask=tokens < vocab_size)


@triton.jit
def race_kernel(out_ptr, words_ptr, TILE: tl.constexpr):
    lanes = tl.arange(0, TILE)
    weights = tl.full([TILE], 1.0, tl.float32)
    tl.store(out_ptr + lanes, race(weights, tl.load(words_ptr + lanes).to(tl.uint32)))


@triton.jit
def ranks_kernel(out_ptr, logits_ptr, best, temperature, TILE: tl.constexpr):
    tokens = tl.arange(0, TILE)
    tl.store(out_ptr + tokens, ranks_of(distances_from(best, tl.load(logits_ptr + tokens), temperature), tokens))


@triton.jit
def halfway_kernel(out_ptr, low_ptr, high_ptr):
    index = tl.program_id(0)
    tl.store(out_ptr + index, halfway(tl.load(low_ptr + index), tl.load(high_ptr + index)))


@triton.jit
def min_p_kernel(out_ptr, log_min_p_ptr):
    index = tl.program_id(0)
    tl.store(out_ptr + index, end_of_min_p(tl.load(log_min_p_ptr + index)))


@triton.jit
def end_of_best_kernel(out_ptr, logits_ptr, top_k_ptr, best, vocab_size, TILE: tl.constexpr):
    index = tl.program_id(0)
    end = tl.full([], 0x7F80_0000, tl.int64) << 32
    top_k = tl.load(top_k_ptr + index)
    tl.store(out_ptr + index, end_of_best(logits_ptr, vocab_size, vocab_size, best, 1.0, end, top_k, TILE))


def rank(distance: float, token: int) -> int:
    """The definition: bits of the float above the token id."""
    return int(torch.tensor(distance, dtype=torch.float32).view(torch.int32)) << 32 | token


@pytest.mark.parametrize("vocab_size", [1, 300])
def test_random_bits_are_those_of_the_torch_operations(vocab_size: int, device: str) -> None:
    rng = random.Random(0)
    places = [(rng.randrange(-(2**70), 2**70), rng.randrange(5), rng.randrange(1024)) for _ in range(20)]
    places += [(0, 0, 0), (2**64 - 1, 3, 1023), (-1, 0, 2**30)]
    streams = [random_bits.stream_key(seed, index) for seed, index, _ in places]
    assert any(key >= 2**63 for key in streams) and any(key < 2**63 for key in streams)
    signed = torch.tensor([key - (key >> 63 << 64) for key in streams], device=device)
    positions = torch.tensor([position for _, _, position in places], dtype=torch.int32, device=device)
    out = torch.zeros(len(places), vocab_size, dtype=torch.int64, device=device)
    words_kernel[(len(places),)](out, signed, positions, vocab_size, TILE=512)
    keys = [random_bits.row_key(*place) for place in places]
    halves = torch.tensor([(key & random_bits.MASK_32, key >> 32) for key in keys])
    expected = random_bits.random_bits(halves, random_bits.token_hashes(vocab_size, torch.device("cpu")))
    assert torch.equal(out.cpu(), expected)


def test_races_keep_all_bits_where_rare_tokens_win(device: str) -> None:
    """A race's value is exp(noise): 1 / -log(1 - u). Small u are where a float32 1 - u has no bits left."""
    words = [0, 1, 2, 3, 100, 127, 128, 255, 2**9, 2**12 + 1, 2**16, 2**20 + 7, 2**24, 2**29 + 5, 2**31, 3 * 2**30]
    out = torch.zeros(16, dtype=torch.float32, device=device)
    race_kernel[(1,)](out, torch.tensor(words, device=device), TILE=16)
    expected = torch.tensor([-1 / math.log1p(-(word + 0.5) * 2.0**-32) for word in words])
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-6, atol=0)
    keys = random_bits.row_keys([], torch.device("cpu")).new_zeros(1, 2)
    noise = random_bits.gumbel_noise(keys, random_bits.token_hashes(1024, torch.device("cpu")), torch.float32)[0]
    bits = random_bits.random_bits(keys, random_bits.token_hashes(1024, torch.device("cpu")))[0]
    many = torch.zeros(1024, dtype=torch.float32, device=device)
    race_kernel[(1,)](many, bits.to(device), TILE=1024)
    torch.testing.assert_close(many.cpu().log(), noise, rtol=0, atol=3e-6)


def test_races_of_extreme_words_are_finite(device: str) -> None:
    out = torch.zeros(2, dtype=torch.float32, device=device)
    race_kernel[(1,)](out, torch.tensor([2**32 - 1, 2**32 - 129], device=device), TILE=2)
    assert bool((out > 0.05).all()) and bool((out < 0.07).all())


@pytest.mark.parametrize("temperature", [1e-10, 0.7, 1.0, 30.0])
def test_ranks_are_in_the_order_of_scores_and_ids(temperature: float, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for logits in (torch.randn(512, generator=generator), torch.randn(512, generator=generator).round() * 40):
        best = logits.max()
        out = torch.zeros(512, dtype=torch.int64, device=device)
        ranks_kernel[(1,)](out, logits.to(device), float(best), temperature, TILE=512)
        scores = (logits - best) / torch.tensor(temperature)
        assert out.cpu().argsort().tolist() == best_tokens(scores.unsqueeze(0), 512)[1][0].tolist()


def test_halfway_is_between_and_mostly_at_the_mean_distance(device: str) -> None:
    pairs: list[tuple[tuple[float, int], tuple[float, int], int | None]] = [
        ((0.0, 0), (3.0, 7), rank(1.5, 0)),
        ((1.0, 9), (2.0, 0), rank(1.5, 0)),
        ((0.5, 3), (0.5, 9), rank(0.5, 6)),  # equal distances: by token id
        ((0.5, 3), (0.5, 4), rank(0.5, 3)),  # nothing is between
        ((0.0, 5), (1e-45, 0), None),
        ((0.0, 0), (math.inf, 0), None),
        ((3e38, 0), (3.3e38, 0), None),  # the mean overflows
        ((1.0, 50), (1.0 + 2**-23, 3), None),
    ]
    pairs += [((distance, 0), (2 * distance, 1), None) for distance in (1e-44, 1e-30, 0.1, 1e10)]
    lows = torch.tensor([rank(*low) for low, _, _ in pairs], device=device)
    highs = torch.tensor([rank(*high) for _, high, _ in pairs], device=device)
    out = torch.zeros(len(pairs), dtype=torch.int64, device=device)
    halfway_kernel[(len(pairs),)](out, lows, highs)
    for got, low, high, (*_, wanted) in zip(out.tolist(), lows.tolist(), highs.tolist(), pairs, strict=True):
        assert low < got < high or (got == low and high == low + 1)
        assert wanted in (None, got)


@pytest.mark.parametrize("kind", ["all differ", "all equal", "few values", "some impossible"])
def test_the_end_of_the_best_has_exactly_so_many_before_it(kind: str, device: str) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    if kind == "all equal":
        logits = torch.zeros(40)
    elif kind == "few values":
        logits = logits.round()
    elif kind == "some impossible":
        logits[10:] = -math.inf
    top_k = [1, 2, 3, 5, 9, 10, 11, 20, 39, 40, 50]
    out = torch.zeros(len(top_k), dtype=torch.int64, device=device)
    limits = torch.tensor(top_k, dtype=torch.int32, device=device)
    end_of_best_kernel[(len(top_k),)](out, logits.to(device), limits, float(logits.max()), 40, TILE=16)
    ranks = [rank(float(distance), token) for token, distance in enumerate(logits.max() - logits)]
    possible = int(logits.isfinite().sum())
    assert [sum(each < end for each in ranks) for end in out.tolist()] == [min(count, possible) for count in top_k]


def test_min_p_ends_behind_the_tokens_that_it_keeps(device: str) -> None:
    limits = [-math.inf, math.log(0.05), math.log(1.0), -math.log(1.0), -1e-45]
    out = torch.zeros(len(limits), dtype=torch.int64, device=device)
    min_p_kernel[(len(limits),)](out, torch.tensor(limits, dtype=torch.float32, device=device))
    last_token = 2**31 - 1
    for limit, end in zip(limits, out.tolist(), strict=True):
        farthest: Any = torch.tensor(-limit, dtype=torch.float32) + 0.0
        beyond = torch.nextafter(farthest, torch.tensor(math.inf))
        assert (rank(float(farthest), last_token) < end) == (limit > -math.inf)  # what is infinitely far has no weight
        assert end <= rank(float(beyond), 0)
    assert rank(3.4e38, last_token) < out[0]
