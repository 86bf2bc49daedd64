"""What the sampling kernels compute for tokens of a row: logits, weights, ranks, random numbers, and winners.

:mod:`pagebrain.kernels.sample_kernels` explains race and rank.
"""

import triton
import triton.language as tl

from pagebrain.kernels.common import LOG2_E
from pagebrain.sampling import random_bits
from pagebrain.sampling.sampler import MAX_TEMPERATURE, MIN_TEMPERATURE
from pagebrain.sampling.truncation import WEIGHT_UNIT

_LOG2_E = tl.constexpr(LOG2_E)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_MAX_TEMPERATURE = tl.constexpr(MAX_TEMPERATURE)
_WEIGHT_UNIT = tl.constexpr(WEIGHT_UNIT)
_GOLDEN_GAMMA = tl.constexpr(random_bits.GOLDEN_GAMMA)
_MIX_64_A, _MIX_64_B = (tl.constexpr(factor) for factor in random_bits.MIX_64_FACTORS)
_LOWBIAS_32_A, _LOWBIAS_32_B = (tl.constexpr(factor) for factor in random_bits.LOWBIAS_32_FACTORS)
_UNIT_STEP = tl.constexpr(random_bits.UNIT_STEP)
_HALF_STEP = tl.constexpr(random_bits.HALF_STEP)

_LARGEST = tl.constexpr(3.4028234663852886e38)  # the largest finite float32
_NO_TOKEN = tl.constexpr(2**31 - 1)

MAX_SPLITS = 64
"""Most programs that share a row. A merge loads this many partial results at once."""

_MAX_SPLITS = tl.constexpr(MAX_SPLITS)


# Reading a row --------------------------------------------------------------------------------------------------------


@triton.jit
def load_logits(logits_ptr, tokens, vocab_size, num_readable):
    """Logits of ``tokens`` in float32, made finite; minus infinity for ids past the vocabulary.

    ``num_readable`` columns may be read. It is a multiple of 16 where the row's padding allows. Then the compiler knows that
    each group of 16 bytes is inside or outside as a whole.
    """
    logits = tl.load(logits_ptr + tokens, mask=tokens < num_readable, other=0.0).to(tl.float32)
    logits = tl.minimum(tl.where(logits > -_LARGEST, logits, -_LARGEST), _LARGEST)  # a comparison with NaN is false
    return tl.where(tokens < vocab_size, logits, -float("inf"))


@triton.jit
def clamped(temperature):
    """The temperature, limited so that float32 can divide by it and hold its inverse."""
    return tl.minimum(tl.maximum(temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE)


@triton.jit
def weights_of(logits, best, temperature):
    """``exp((logit - best) / temperature)``: probabilities relative to the best token's."""
    return tl.exp2((logits - best) * (_LOG2_E / temperature))


@triton.jit
def integer_weights(weights):
    """Weights as integers, whose sums do not depend on order; see :data:`pagebrain.sampling.truncation.WEIGHT_UNIT`."""
    return (weights * _WEIGHT_UNIT).to(tl.int64)


@triton.jit
def distances_from(best, logits, temperature):
    """How far each score is below the best one. It decides which scores are equal, so it is rounded as in torch."""
    return tl.div_rn(best - logits, temperature)


@triton.jit
def ranks_of(distances, tokens):
    """64-bit integers in the order of the distances; equal distances in the order of the token ids."""
    return (distances.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tokens


@triton.jit
def better(values, tokens, best_values, best_tokens):
    """The better of two ``(value, token)``, element by element; the second if they are equal."""
    is_better = values > best_values
    return tl.where(is_better, values, best_values), tl.where(is_better, tokens, best_tokens)


@triton.jit
def best_of(values, tokens):
    """The best of many ``(value, token)``; the lowest token of equal ones."""
    best = tl.max(values, axis=0)
    return best, tl.min(tl.where(values == best, tokens, _NO_TOKEN), axis=0)


@triton.jit
def merged(values_ptr, tokens_ptr, index, num_splits):
    """The best result among the splits of row ``index``."""
    splits = tl.arange(0, _MAX_SPLITS)
    values = tl.load(values_ptr + index * num_splits + splits, mask=splits < num_splits, other=-float("inf"))
    tokens = tl.load(tokens_ptr + index * num_splits + splits, mask=splits < num_splits, other=_NO_TOKEN)
    return best_of(values, tokens)


@triton.jit
def split_range(vocab_size, num_splits, TILE: tl.constexpr):
    """``(first, last)``: this program reads tokens ``first .. last - 1``, in whole tiles."""
    split_len = tl.cdiv(tl.cdiv(vocab_size, TILE), num_splits) * TILE
    first = tl.program_id(1) * split_len
    return first, tl.minimum(first + split_len, vocab_size)


# Random numbers: the same bits as those of pagebrain.sampling.random_bits ---------------------------------------------


@triton.jit
def row_key(stream_key, output_position):
    """:func:`pagebrain.sampling.random_bits.row_key` in uint64, where arithmetic wraps around, as two uint32: low, high."""
    word = stream_key.to(tl.uint64, bitcast=True) + (output_position + 1).to(tl.uint64) * _GOLDEN_GAMMA
    word = (word ^ (word >> 30)) * _MIX_64_A
    word = (word ^ (word >> 27)) * _MIX_64_B
    word = word ^ (word >> 31)
    return word.to(tl.uint32), (word >> 32).to(tl.uint32)


@triton.jit
def lowbias32(words):
    """A permutation of 32-bit words."""
    words = (words ^ (words >> 16)) * _LOWBIAS_32_A
    words = (words ^ (words >> 15)) * _LOWBIAS_32_B
    return words ^ (words >> 16)


@triton.jit
def random_words(key_low, key_high, tokens):
    """32 random bits for each token of a row."""
    return lowbias32((lowbias32(tokens.to(tl.uint32)) ^ key_low) + key_high)


@triton.jit
def race(weights, words):
    """``weight / E`` with an exponentially distributed ``E = -log(1 - u)`` for each random word's ``u`` in (0, 1).

    Where ``u`` is small, ``rest = 1 - u`` has lost most of its bits. ``-log(rest)`` is then wrong by the same factor as
    ``1 - rest``, and ``E = -log(rest) * u / (1 - rest)`` is exact again (Kahan's log1p).
    """
    uniform = words.to(tl.float32) * _UNIT_STEP + _HALF_STEP
    rest = 1.0 - uniform
    has_rest = rest < 1.0
    numerator = tl.where(has_rest, weights * (1.0 - rest), weights)
    return numerator / tl.where(has_rest, -tl.log(rest) * uniform, uniform)
