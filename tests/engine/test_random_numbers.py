"""Random numbers are a pure function of (request seed, sample index, output position, token id), and good ones.

The oracle is written a second time here, in unsigned Python integers. Statistical checks use fixed seeds, so they either
always pass or always fail; their limits leave a chance of about 1 in 100,000 for a good generator to have been unlucky.
"""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pagebrain.sampling import Sampler, SampleRow, random_bits
from pagebrain.sampling_params import SamplingParams

CPU = torch.device("cpu")
NO_IDS = torch.empty(0, dtype=torch.int64)


def row(seed: int = 0, sample_index: int = 0, output_position: int = 0, params: SamplingParams | None = None) -> SampleRow:
    return SampleRow(params or SamplingParams(), seed, sample_index, output_position, NO_IDS, 0)


def words(rows: list[SampleRow], vocab_size: int) -> Tensor:
    return random_bits.random_bits(random_bits.row_keys(rows, CPU), random_bits.token_hashes(vocab_size, CPU))


# The oracle -----------------------------------------------------------------------------------------------------------


def splitmix64_output(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def lowbias32(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def oracle_key(seed: int, sample_index: int, output_position: int) -> int:
    limbs = [(seed >> 64 * i) % 2**64 for i in range(abs(seed).bit_length() // 64 + 1)]  # room for the magnitude and a sign
    key = 0
    for limb in [*limbs, sample_index]:
        key = splitmix64_output(key ^ limb)
    return splitmix64_output((key + output_position * 0x9E3779B97F4A7C15) % 2**64)


def oracle_word(key: int, token_id: int) -> int:
    return lowbias32(((lowbias32(token_id) ^ key % 2**32) + (key >> 32)) % 2**32)


KEY_0 = 0x238275BC38FCBE91
WORDS_0 = [0x77C7A79C, 0x85DE036D, 0x5EF0FB85, 0xDFE1FB93]
KEY_1 = 0xAC3CF64D3167D187
WORDS_1 = [0x6902FDF3, 0xCAFD85D6, 0xE087F75A, 0xAEA01457]

SEEDS = [
    0,
    1,
    2,
    12345,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    2**200 + 7,
    -1,
    -2,
    -(2**63),
    -(2**63) - 1,
    -(2**100),
]


@pytest.mark.parametrize("seed", SEEDS)
def test_words_equal_those_of_an_independent_implementation(seed: int) -> None:
    places = [(index, position) for index in (0, 1, 127) for position in (0, 1, 1023)]
    got = words([row(seed, index, position) for index, position in places], 300).tolist()
    for (index, position), got_row in zip(places, got, strict=True):
        key = oracle_key(seed, index, position)
        assert random_bits.row_key(seed, index, position) == key
        assert got_row == [oracle_word(key, token_id) for token_id in range(300)]


def test_words_never_change_between_versions() -> None:
    # Pinned, since a user's seed must keep its meaning. The first line is from the SplitMix64 reference (seed 1234567).
    assert random_bits.mix64(1234567 + random_bits.GOLDEN_GAMMA) == 6457827717110365317
    assert random_bits.row_key(0, 0, 0) == KEY_0
    assert words([row(0, 0, 0)], 4).tolist()[0] == WORDS_0
    assert random_bits.row_key(-7, 3, 100) == KEY_1
    assert words([row(-7, 3, 100)], 4).tolist()[0] == WORDS_1


def test_all_seeds_give_different_keys() -> None:
    assert len({random_bits.row_key(seed, 0, 0) for seed in SEEDS}) == len(SEEDS)
    assert len({random_bits.row_key(s, i, p) for s in range(-20, 20) for i in range(20) for p in range(50)}) == 40 * 20 * 50


# Quality --------------------------------------------------------------------------------------------------------------

AXES = ("seed", "sample_index", "output_position", "token")
GRID = (16, 8, 32, 64)


@pytest.fixture(scope="module")
def grid() -> Tensor:
    """Words of neighbouring seeds, sample indices, positions and tokens: ``[16, 8, 32, 64]``."""
    rows = [row(*place) for place in product(range(GRID[0]), range(GRID[1]), range(GRID[2]))]
    return words(rows, GRID[3]).view(GRID)


def test_every_bit_is_balanced(grid: Tensor) -> None:
    assert_bits_balanced(grid)


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_differ_in_every_bit_half_the_time(grid: Tensor, axis: str) -> None:
    dim = AXES.index(axis)
    size = grid.shape[dim]
    assert_bits_balanced(grid.narrow(dim, 1, size - 1) ^ grid.narrow(dim, 0, size - 1))


def assert_bits_balanced(values: Tensor) -> None:
    assert int(values.min()) >= 0 and int(values.max()) < 2**32
    ones = torch.stack([(values >> bit & 1).sum() for bit in range(32)]).double()
    z = (ones - values.numel() / 2) / math.sqrt(values.numel() / 4)
    assert z.abs().max() < 5, z


def test_words_repeat_no_more_often_than_by_chance(grid: Tensor) -> None:
    # n * (n - 1) / 2 pairs, each equal with probability 2**-32: 8 are expected. One that ignores an argument has thousands.
    repeats = grid.numel() - len(set(grid.flatten().tolist()))
    assert repeats < 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_gumbel_distributed(dtype: torch.dtype) -> None:
    keys = random_bits.row_keys([row(output_position=p) for p in range(40)], CPU)
    noise = random_bits.gumbel_noise(keys, random_bits.token_hashes(50_257, CPU), dtype).double().flatten()
    count = noise.numel()
    assert noise.dtype is torch.float64 and count > 2_000_000
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / count)
    # Kolmogorov-Smirnov distance to the distribution function exp(-exp(-x))
    cdf = (-(-noise.sort().values).exp()).exp()
    distance = (cdf - torch.arange(1, count + 1) / count).abs().max()
    assert distance < 2.5 / math.sqrt(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_keeps_its_resolution_where_rare_tokens_win(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = [0, 1, 2, 3, 100, 2**16, 2**31, 2**32 - 129, 2**32 - 2, 2**32 - 1]
    monkeypatch.setattr(random_bits, "random_bits", lambda keys, hashes: torch.tensor([extremes]))
    noise = random_bits.gumbel_noise(NO_IDS, NO_IDS, dtype)[0]
    assert noise.isfinite().all()
    expected = [-math.log(-math.log1p(-(word + 0.5) * 2.0**-32)) for word in extremes[:-3]]
    assert torch.allclose(noise[:-3], torch.tensor(expected, dtype=dtype), rtol=1e-5)
    assert noise[0] > 22.8 and -2.9 < noise[-1] < -2.8


# What is drawn --------------------------------------------------------------------------------------------------------


def chi_square_z(counts: Tensor, expected: Tensor, degrees: int) -> float:
    """How many standard deviations Pearson's statistic lies above its mean (Wilson and Hilferty's normal approximation)."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * degrees)
    cube_root = math.exp(math.log(statistic / degrees) / 3)
    return (cube_root - (1 - spread)) / math.sqrt(spread)


def draw(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    sampler = Sampler(SimpleNamespace(vocab_size=len(logits), eos_token_ids=()))  # type: ignore[arg-type]
    return sampler.sample(logits.expand(len(rows), -1), rows).token_ids


NUM_DRAWS = 20_000
VARIATIONS = {
    "seed": [row(seed=i) for i in range(NUM_DRAWS)],
    "sample_index": [row(sample_index=i) for i in range(NUM_DRAWS)],
    "output_position": [row(output_position=i) for i in range(NUM_DRAWS)],
}


@pytest.mark.parametrize("axis", VARIATIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(axis: str, temperature: float) -> None:
    logits = torch.linspace(0.0, 3.0, 40)
    params = SamplingParams(temperature=temperature)
    rows = [row(r.seed, r.sample_index, r.output_position, params) for r in VARIATIONS[axis]]
    counts = draw(logits, rows).bincount(minlength=40)
    assert chi_square_z(counts, NUM_DRAWS * (logits / temperature).softmax(0), 39) < 4.3


def test_frequencies_after_truncation_are_those_of_the_renormalised_softmax() -> None:
    logits = torch.linspace(0.0, 3.0, 40)
    params = SamplingParams(top_k=20, top_p=0.9, temperature=1.5)
    counts = draw(logits, [row(output_position=i, params=params) for i in range(NUM_DRAWS)]).bincount(minlength=40)
    kept = counts > 0
    expected = NUM_DRAWS * (logits[kept] / 1.5).softmax(0)
    assert 10 < kept.sum() < 20
    assert chi_square_z(counts[kept], expected, int(kept.sum()) - 1) < 4.3


@pytest.mark.parametrize("axis", VARIATIONS)
@pytest.mark.parametrize("distance", [1, 2])
def test_neighbouring_draws_are_independent(axis: str, distance: int) -> None:
    logits = torch.linspace(0.0, 1.0, 6)
    drawn = draw(logits, VARIATIONS[axis])
    pairs = drawn[:-distance] * 6 + drawn[distance:]
    probs = logits.softmax(0)
    expected = len(pairs) * (probs.unsqueeze(1) * probs).flatten()
    assert chi_square_z(pairs.bincount(minlength=36), expected, 35) < 4.3


def test_noise_of_neighbouring_tokens_is_independent() -> None:
    keys = random_bits.row_keys([row(output_position=p) for p in range(10)], CPU)
    uniform = (random_bits.random_bits(keys, random_bits.token_hashes(50_257, CPU)).double() + 0.5) / 2**32
    for distance in (1, 2, 256):
        left, right = (uniform[:, :-distance] * 8).long(), (uniform[:, distance:] * 8).long()
        counts = (left * 8 + right).flatten().bincount(minlength=64)
        assert chi_square_z(counts, torch.full((64,), left.numel() / 64), 63) < 4.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_words_are_the_same_on_a_gpu() -> None:
    cuda = torch.device("cuda")
    rows = [row(seed, index, position) for seed in SEEDS for index in (0, 5) for position in (0, 1023)]
    on_gpu = random_bits.random_bits(random_bits.row_keys(rows, cuda), random_bits.token_hashes(50_257, cuda))
    assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), words(rows, 50_257))
