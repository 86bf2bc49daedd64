"""Random numbers that are a pure function of (request seed, sample index, output position, token id).

A generator with a state would give a sequence other numbers when other sequences join its batch, when it is preempted, or
with async scheduling. Here there is no state: the random number is a hash of the four arguments. There are two stages:

1. On the host, :func:`row_key` hashes (seed, sample index, output position) to 64 bits with SplitMix64
   (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
2. On the device, :func:`random_bits` hashes that key and each token id to 32 bits with lowbias32, a multiply-xorshift
   permutation found by Chris Wellons' hash-prospector (https://github.com/skeeto/hash-prospector, public domain).

In unsigned 32-bit arithmetic, which wraps around, the second stage is::

    lowbias32(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    bits(key, token_id) = lowbias32((lowbias32(token_id) ^ low32(key)) + high32(key))

The inner hash depends on the token id alone, so it is computed once per vocabulary. It spreads neighbouring ids over all
32 bits; otherwise two keys that differ in low bits only would give the same numbers to permuted tokens. torch has no
wrapping unsigned arithmetic on all devices, so the code below keeps 32-bit words in int64, where nothing can overflow.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pagebrain.sampling.rows import SampleRow, per_row

MASK_32 = 0xFFFF_FFFF
MASK_64 = 0xFFFF_FFFF_FFFF_FFFF

GOLDEN_GAMMA = 0x9E37_79B9_7F4A_7C15  # SplitMix64's step: 2**64 divided by the golden ratio, made odd
MIX_64_FACTORS = (0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB)
LOWBIAS_32_FACTORS = (0x7FEB_352D, 0x846C_A68B)

# A uniform number in (0, 1) is bits * UNIT_STEP + HALF_STEP. In float32 the largest word rounds up to 2**32; the factor
# is one ulp below 2**-32 so that even this one stays below 1, and the offset keeps word 0 above 0.
UNIT_STEP = 2.0**-32 * (1.0 - 2.0**-24)
HALF_STEP = 2.0**-33


def mix64(word: int) -> int:
    """SplitMix64's finalizer: a permutation of 64-bit words in which each input bit influences each output bit."""
    word = ((word ^ (word >> 30)) * MIX_64_FACTORS[0]) & MASK_64
    word = ((word ^ (word >> 27)) * MIX_64_FACTORS[1]) & MASK_64
    return word ^ (word >> 31)


@lru_cache(maxsize=1 << 10)  # as many as run at once on a CPU; on a GPU each key is computed once
def stream_key(seed: int, sample_index: int) -> int:
    """A 64-bit key for one sample of one request.

    ``seed`` is any integer. It is split into as many 64-bit words in two's complement as it needs. :func:`mix64` mixes these
    words and then ``sample_index`` into the key.
    """
    num_words = seed.bit_length() // 64 + 1
    seed_bytes = seed.to_bytes(8 * num_words, "little", signed=True)
    seed_words = [int.from_bytes(seed_bytes[start : start + 8], "little") for start in range(0, len(seed_bytes), 8)]
    key = 0
    for word in (*seed_words, sample_index & MASK_64):
        key = mix64(((key ^ word) + GOLDEN_GAMMA) & MASK_64)
    return key


def row_key(seed: int, sample_index: int, output_position: int) -> int:
    """A 64-bit key for one token to draw: number ``output_position`` of the sample's SplitMix64 stream."""
    return mix64((stream_key(seed, sample_index) + (output_position + 1) * GOLDEN_GAMMA) & MASK_64)


def row_keys(rows: Sequence[SampleRow], device: torch.device) -> Tensor:
    """The key of each row as two 32-bit words, low then high: int64 ``[num_rows, 2]``."""
    keys = [row_key(row.seed, row.sample_index, row.output_position) for row in rows]
    return per_row([(key & MASK_32, key >> 32) for key in keys], torch.int64, device)


def token_hashes(vocab_size: int, device: torch.device) -> Tensor:
    """``lowbias32(token_id)`` of every token id: int64 ``[vocab_size]``, each in ``0 .. 2**32 - 1``."""
    return _lowbias32_(torch.arange(vocab_size, dtype=torch.int64, device=device))


def random_bits(keys: Tensor, hashes: Tensor) -> Tensor:
    """Random words for tokens of rows.

    Args:
        keys: int64 ``[num_rows, 2]`` from :func:`row_keys`.
        hashes: from :func:`token_hashes`, int64 ``[num_tokens]`` (the same for all rows) or ``[num_rows, num_tokens]``.

    Returns:
        int64 ``[num_rows, num_tokens]``, each in ``0 .. 2**32 - 1``.
    """
    words = hashes ^ keys[:, 0:1]
    words += keys[:, 1:2]
    words &= MASK_32
    return _lowbias32_(words)


def gumbel_noise(keys: Tensor, hashes: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise ``[num_rows, num_tokens]`` for the arguments of :func:`random_bits`.

    ``argmax(logits + noise)`` is then a draw from ``softmax(logits)`` (the Gumbel-max trick: Gumbel 1954; Maddison et al.,
    "A* sampling", 2014), and since the noise of one token does not depend on the others, dropping tokens before the draw
    renormalises by itself. Values lie between -2.9 and 22.9.

    A token of small probability wins only by large noise, so resolution is needed there: ``log1p`` keeps all 32 bits of a
    uniform number close to 0. ``log`` of a number close to 1 would round them away.
    """
    uniform = random_bits(keys, hashes).to(dtype)
    uniform *= UNIT_STEP
    uniform += HALF_STEP
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _lowbias32_(words: Tensor) -> Tensor:
    """lowbias32 in place on int64 words in ``0 .. 2**32 - 1``.

    A factor above 2**31 is taken minus 2**32, which is the same modulo 2**32: so no product leaves the int64 range.
    """
    shifted = torch.empty_like(words)
    for shift, factor in zip((16, 15), LOWBIAS_32_FACTORS, strict=True):
        words ^= torch.bitwise_right_shift(words, shift, out=shifted)
        words *= factor if factor < 1 << 31 else factor - (1 << 32)
        words &= MASK_32
    words ^= torch.bitwise_right_shift(words, 16, out=shifted)
    return words
