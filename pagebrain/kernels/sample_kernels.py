r"""The kernels of :mod:`pagebrain.kernels.sample`: from rows of logits to tokens, without a sort.

Several programs read a row at once, each one *split* of it. Each stores its best token, and the next kernel merges them.
There are three launches: ``best_kernel`` finds each row's most probable token, which is enough for greedy rows;
``draw_kernel`` draws a token from the whole row; ``choose_kernel`` applies top-k and top-p and writes the token. They use
three ideas:

**The draw is a race.** Gumbel-max takes the token with the largest ``score + noise``, where ``noise = -log(E)`` and ``E`` is
exponentially distributed. The exponential function of that is ``exp(score) / E``. It is increasing, so the same token wins.
This saves one logarithm.

**A rank is one integer.** A token has the distance ``(best - logit) / temperature >= 0`` from the best one. The bits of
floats that are not negative, read as integers, are in the order of the floats. With the token id below them in one 64-bit
word, equal scores are in the order of their ids, and ``rank(a) < rank(b)`` means that ``a`` comes before ``b``. (The sampler
of torch operations packs the same two values, in :mod:`pagebrain.sampling.ranking`.)

**A token outside top-k or top-p is rejected after the draw.** The kept tokens are a prefix of the ranking. So one pass,
which adds up the tokens before the drawn one, decides whether it is kept. If not, no later token is kept either, and the
draw is repeated among the tokens before it. The winner of a race also wins against fewer tokens, so the last draw is the one
of a sampler that first drops and then draws. After a rejection, a pivot halfway to the tokens that are known to be kept is
tested too, which often shortens the rest. (Rejection sampling with two pivots, as in "Sorting-Free GPU Kernels for LLM
Sampling", FlashInfer, 2025; here each token has its own random number, so that the draw can be repeated.) With a top-p of
0.95 the first draw is kept 95 times in 100; a top-p of 0.001 of a flat distribution takes about four draws.
"""

import triton
import triton.language as tl

from pagebrain.kernels.sample_limits import draw_within, end_of_best, end_of_min_p
from pagebrain.kernels.sample_row import (
    best_of,
    better,
    clamped,
    distances_from,
    load_logits,
    merged,
    race,
    random_words,
    row_key,
    split_range,
    weights_of,
)


@triton.jit(do_not_specialize=["num_splits"])
def best_kernel(
    best_values_ptr,
    best_tokens_ptr,
    logits_ptr,
    logits_stride,
    vocab_size,
    num_readable,
    num_splits,
    TILE: tl.constexpr,
):
    """The most probable token of each split and its logit. Grid ``[num_tokens, num_splits]``."""
    index = tl.program_id(0).to(tl.int64)
    logits_ptr += index * logits_stride
    first, last = split_range(vocab_size, num_splits, TILE)
    lanes = tl.arange(0, TILE)
    best_values = tl.full([TILE], -float("inf"), tl.float32)
    best_tokens = first + lanes
    for tile in range(first, last, TILE):
        tokens = tile + lanes
        logits = load_logits(logits_ptr, tokens, vocab_size, num_readable)
        best_values, best_tokens = better(logits, tokens, best_values, best_tokens)
    value, token = best_of(best_values, best_tokens)
    partial = index * num_splits + tl.program_id(1)
    tl.store(best_values_ptr + partial, value)
    tl.store(best_tokens_ptr + partial, token)


@triton.jit(do_not_specialize=["num_splits"])
def draw_kernel(
    drawn_values_ptr,
    drawn_tokens_ptr,
    best_values_ptr,
    best_tokens_ptr,
    logits_ptr,
    active_rows_ptr,
    context_lens_ptr,
    temperature_ptr,
    log_min_p_ptr,
    stream_key_ptr,
    num_prompt_tokens_ptr,
    logits_stride,
    vocab_size,
    num_readable,
    num_splits,
    TILE: tl.constexpr,
):
    """The winner of each split's race, without top-k and top-p. Grid ``[num_tokens, num_splits]``."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(active_rows_ptr + index).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if temperature <= 0:
        return
    temperature = clamped(temperature)
    farthest = -tl.load(log_min_p_ptr + row)
    output_position = tl.load(context_lens_ptr + row) - tl.load(num_prompt_tokens_ptr + row)
    key_low, key_high = row_key(tl.load(stream_key_ptr + row), output_position)
    best, _ = merged(best_values_ptr, best_tokens_ptr, index, num_splits)

    logits_ptr += index * logits_stride
    first, last = split_range(vocab_size, num_splits, TILE)
    lanes = tl.arange(0, TILE)
    best_values = tl.zeros([TILE], tl.float32)  # also the value of a token of weight 0, so such a token never wins
    best_tokens = first + lanes
    for tile in range(first, last, TILE):
        tokens = tile + lanes
        logits = load_logits(logits_ptr, tokens, vocab_size, num_readable)
        weights = weights_of(logits, best, temperature)
        if farthest < float("inf"):
            weights = tl.where(distances_from(best, logits, temperature) <= farthest, weights, 0.0)
        values = race(weights, random_words(key_low, key_high, tokens))
        best_values, best_tokens = better(values, tokens, best_values, best_tokens)
    value, token = best_of(best_values, best_tokens)
    partial = index * num_splits + tl.program_id(1)
    tl.store(drawn_values_ptr + partial, value)
    tl.store(drawn_tokens_ptr + partial, token)


@triton.jit(do_not_specialize=["num_splits"])
def deliver_best_kernel(
    out_ptr,
    token_ids_ptr,
    best_values_ptr,
    best_tokens_ptr,
    active_rows_ptr,
    context_lens_ptr,
    token_ids_stride,
    max_model_len,
    num_splits,
):
    """Greedy rows: merge the results of ``best_kernel`` and write the token. Grid ``[num_tokens]``."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(active_rows_ptr + index).to(tl.int64)
    _, token = merged(best_values_ptr, best_tokens_ptr, index, num_splits)
    deliver(out_ptr + index, token_ids_ptr + row * token_ids_stride, context_lens_ptr + row, max_model_len, token)


@triton.jit(do_not_specialize=["num_splits"])
def choose_kernel(
    out_ptr,
    token_ids_ptr,
    drawn_values_ptr,
    drawn_tokens_ptr,
    best_values_ptr,
    best_tokens_ptr,
    logits_ptr,
    active_rows_ptr,
    context_lens_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    log_min_p_ptr,
    stream_key_ptr,
    num_prompt_tokens_ptr,
    token_ids_stride,
    max_model_len,
    logits_stride,
    vocab_size,
    num_readable,
    num_splits,
    TILE: tl.constexpr,
):
    """Merge the results of the splits; draw again where top-k or top-p rejects the token. Grid ``[num_tokens]``."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(active_rows_ptr + index).to(tl.int64)
    best, token = merged(best_values_ptr, best_tokens_ptr, index, num_splits)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        temperature = clamped(temperature)
        _, token = merged(drawn_values_ptr, drawn_tokens_ptr, index, num_splits)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        has_top_k = (top_k > 0) & (top_k < vocab_size)
        if has_top_k | (top_p < 1):
            logits_ptr += index * logits_stride
            end = end_of_min_p(tl.load(log_min_p_ptr + row))
            if has_top_k & (top_p < 1):  # then top-p applies to the probabilities among the k best
                end = end_of_best(logits_ptr, vocab_size, num_readable, best, temperature, end, top_k, TILE)
            limit = tl.where(has_top_k, top_k, vocab_size)
            output_position = tl.load(context_lens_ptr + row) - tl.load(num_prompt_tokens_ptr + row)
            key_low, key_high = row_key(tl.load(stream_key_ptr + row), output_position)
            token = draw_within(
                logits_ptr, vocab_size, num_readable, best, temperature, token, limit, top_p, end, key_low, key_high, TILE
            )
    deliver(out_ptr + index, token_ids_ptr + row * token_ids_stride, context_lens_ptr + row, max_model_len, token)


@triton.jit
def deliver(out_ptr, token_ids_ptr, context_len_ptr, max_model_len, token):
    """Write the token for the host, and for the next step if the sequence has room for one."""
    tl.store(out_ptr, token.to(out_ptr.dtype.element_ty))
    position = tl.load(context_len_ptr).to(tl.int64)
    has_place = (position >= 0) & (position < max_model_len)
    tl.store(token_ids_ptr + position, token.to(token_ids_ptr.dtype.element_ty), mask=has_place)
