r"""The kernels behind :mod:`pagebrain.kernels.sample`: from rows of logits to tokens, and nothing is sorted.

A row is read by several programs at once, its *splits*; each leaves its best token, and the next kernel merges them. Three
launches: ``best_kernel`` finds each row's most probable token, which is all that greedy rows need; ``draw_kernel``
draws a token from the whole row; ``choose_kernel`` sees to top-k and top-p and delivers. Three ideas carry it:

**The draw is a race.** Gumbel-max takes the token with the largest ``score + noise``, where ``noise = -log(E)`` and ``E`` is
exponentially distributed. The exponential function of that is ``exp(score) / E``: the same token wins, one logarithm less.

**A rank is one integer.** A token lies at the distance ``(best - logit) / temperature >= 0`` from the best one. The bits of
floats that are not negative, read as integers, are in the order of the floats. With the token id below them in one 64-bit
word, equal scores are in the order of their ids, and ``rank(a) < rank(b)`` means that ``a`` comes before ``b``. (The sampler
of torch operations packs the same two things, in :mod:`pagebrain.sampling.ranking`.)

**A token outside top-k or top-p is refused after the draw.** What is kept is a prefix of the ranking, so one pass that adds
up what comes before the drawn token tells whether it is kept. If not, nothing from it on is, and the draw is repeated among
what comes before it. The winner of a race also wins against fewer runners, so the last draw is the one of a sampler that
drops first and draws then. After a refusal a pivot halfway to what is known to be kept is looked at too, and often shortens
what is left. (Rejection sampling with two pivots, as in "Sorting-Free GPU Kernels for LLM Sampling", FlashInfer, 2025; here
with random numbers that belong to the tokens, so that it can be repeated.) With a top-p of 0.95 the first draw is kept 95
times in 100; a top-p of a thousandth, of a flat distribution, takes about four draws.
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
    """The winner of each split's race; top-k and top-p are left to ``choose_kernel``. Grid as above."""
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
    best_values = tl.zeros([TILE], tl.float32)  # what a token without weight gets too: it never wins against the best one
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
    """Greedy rows: merge what ``best_kernel`` left. Grid ``[num_tokens]``."""
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
    """Merge what the others left; where top-k or top-p refuse the token drawn, draw again. Grid ``[num_tokens]``."""
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
            if has_top_k & (top_p < 1):  # then top-p means the probabilities among the k best
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
    """The token goes to the host, and to where the next step looks for it if there is a next step."""
    tl.store(out_ptr, token.to(out_ptr.dtype.element_ty))
    position = tl.load(context_len_ptr).to(tl.int64)
    has_place = (position >= 0) & (position < max_model_len)
    tl.store(token_ids_ptr + position, token.to(token_ids_ptr.dtype.element_ty), mask=has_place)
