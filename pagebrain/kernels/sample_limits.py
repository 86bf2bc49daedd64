"""Top-k and top-p of one row, by one program: add up the tokens before a rank, and draw again if they are too many.

:mod:`pagebrain.kernels.sample_kernels` explains why this gives the token of a sampler that first drops and then draws.
"""

import triton
import triton.language as tl

from pagebrain.kernels.sample_row import (
    best_of,
    better,
    distances_from,
    integer_weights,
    load_logits,
    race,
    random_words,
    ranks_of,
    weights_of,
)

_INFINITY_BITS = tl.constexpr(0x7F80_0000)
_NO_RANK = tl.constexpr(2**63 - 1)


@triton.jit
def sums_before(logits_ptr, vocab_size, num_readable, best, temperature, rank, end, TILE: tl.constexpr):
    """The number of tokens before ``rank``, their integer weight, and the integer weight of all tokens before ``end``."""
    counts = tl.zeros([TILE], tl.int32)
    before = tl.zeros([TILE], tl.int64)
    total = tl.zeros([TILE], tl.int64)
    for tile in range(0, vocab_size, TILE):
        tokens = tile + tl.arange(0, TILE)
        logits = load_logits(logits_ptr, tokens, vocab_size, num_readable)
        ranks = ranks_of(distances_from(best, logits, temperature), tokens)
        weights = integer_weights(weights_of(logits, best, temperature))
        counts += (ranks < rank).to(tl.int32)
        before += tl.where(ranks < rank, weights, 0)
        total += tl.where(ranks < end, weights, 0)
    return tl.sum(counts, axis=0), tl.sum(before, axis=0), tl.sum(total, axis=0)


@triton.jit
def draw_before(logits_ptr, vocab_size, num_readable, best, temperature, rank, key_low, key_high, TILE: tl.constexpr):
    """The winner of the race among the tokens before ``rank``."""
    best_values = tl.zeros([TILE], tl.float32)
    best_tokens = tl.arange(0, TILE)
    for tile in range(0, vocab_size, TILE):
        tokens = tile + tl.arange(0, TILE)
        logits = load_logits(logits_ptr, tokens, vocab_size, num_readable)
        is_before = ranks_of(distances_from(best, logits, temperature), tokens) < rank
        weights = tl.where(is_before, weights_of(logits, best, temperature), 0.0)
        values = race(weights, random_words(key_low, key_high, tokens))
        best_values, best_tokens = better(values, tokens, best_values, best_tokens)
    _, token = best_of(best_values, best_tokens)
    return token


@triton.jit
def draw_within(
    logits_ptr,
    vocab_size,
    num_readable,
    best,
    temperature,
    token,
    top_k,
    top_p,
    end,
    key_low,
    key_high,
    TILE: tl.constexpr,
):
    """The token drawn among those with fewer than ``top_k`` tokens and less than ``top_p`` of the weight before them.

    ``token`` is the first draw; ``top_p`` is a share of the weight of all tokens before ``end``. The loop ends: each draw
    comes before the rejected one, and the best token is always kept.
    """
    kept = tl.zeros([], tl.int64)  # the largest rank that is known to be kept; a token of this rank need not exist
    is_refused = True
    while is_refused:
        logit = load_logits(logits_ptr, token, vocab_size, num_readable)
        rank = ranks_of(distances_from(best, logit, temperature), token)
        count, before, total = sums_before(logits_ptr, vocab_size, num_readable, best, temperature, rank, end, TILE)
        is_refused = is_dropped(count, before, total, top_k, top_p)
        if is_refused:
            pivot = halfway(kept, rank)
            count, before, total = sums_before(logits_ptr, vocab_size, num_readable, best, temperature, pivot, end, TILE)
            if is_dropped(count, before, total, top_k, top_p):
                rank = pivot
            else:
                kept = pivot
            token = draw_before(logits_ptr, vocab_size, num_readable, best, temperature, rank, key_low, key_high, TILE)
    return token


@triton.jit
def is_dropped(count, before, total, top_k, top_p):
    """Whether top-k or top-p drops a rank with ``count`` tokens of weight ``before``, out of ``total``, before it."""
    is_beyond_p = (top_p < 1) & (before.to(tl.float64) >= top_p * total.to(tl.float64))
    return (count > 0) & ((count >= top_k) | is_beyond_p)


@triton.jit
def count_before(logits_ptr, vocab_size, num_readable, best, temperature, rank, TILE: tl.constexpr):
    """The number of tokens before ``rank``, the largest rank among them, and the smallest rank of the other tokens."""
    counts = tl.zeros([TILE], tl.int32)
    last = tl.zeros([TILE], tl.int64)
    following = tl.full([TILE], _NO_RANK, tl.int64)
    for tile in range(0, vocab_size, TILE):
        tokens = tile + tl.arange(0, TILE)
        logits = load_logits(logits_ptr, tokens, vocab_size, num_readable)
        ranks = ranks_of(distances_from(best, logits, temperature), tokens)
        counts += (ranks < rank).to(tl.int32)
        last = tl.maximum(last, tl.where(ranks < rank, ranks, 0))
        following = tl.minimum(following, tl.where(ranks < rank, _NO_RANK, ranks))
    return tl.sum(counts, axis=0), tl.max(last, axis=0), tl.min(following, axis=0)


@triton.jit
def end_of_best(logits_ptr, vocab_size, num_readable, best, temperature, end, top_k, TILE: tl.constexpr):
    """A rank with exactly ``top_k`` tokens before it, or ``end`` if at most ``top_k`` come before ``end``; by bisection.

    Ranks are unique, so such a rank exists. After each step the bounds move to ranks of tokens: bfloat16 logits have few
    values with large gaps, and among equal scores only the token ids remain to be searched.
    """
    low = tl.zeros([], tl.int64)  # at most top_k tokens come before it
    high = end  # more than top_k tokens come before it, unless end is the answer
    rank = end
    is_searching = True
    while is_searching:
        count, last, following = count_before(logits_ptr, vocab_size, num_readable, best, temperature, rank, TILE)
        if count > top_k:
            high = last + 1
        else:
            low = following
        is_searching = (count != top_k) & (low + 1 < high)
        if is_searching:
            rank = halfway(low, high)
    return rank


@triton.jit
def halfway(low, high):
    """A rank between two, at the mean of their distances; or the mean of the two integers if that is not between them.

    The mean of the integers serves equal distances. With it alone, most steps would separate distances close to 0.
    """
    near = (low >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    far = (high >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    rank = ranks_of((near + far) * 0.5, 0)
    return tl.where((rank > low) & (rank < high), rank, low + (high - low) // 2)


@triton.jit
def end_of_min_p(log_min_p):
    """The rank that all tokens come before which min-p keeps and which have any weight."""
    farthest = (0.0 - log_min_p).to(tl.int32, bitcast=True)  # 0.0 - 0.0 is not -0.0, whose bits are those of a large number
    return tl.minimum(farthest + 1, _INFINITY_BITS).to(tl.int64) << 32
