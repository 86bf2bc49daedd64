"""Keeping only the probable tokens: min-p, then top-k, then top-p, each on the result of the one before.

Top-k and top-p need the tokens in order. A vocabulary of 50,257 is expensive to sort on a CPU, and most of it is dropped, so
only as many of the best tokens are sorted as are needed.

The kept set is a function of the row alone, on any device and in any batch: of equal scores the lower token id comes first
(:mod:`.ranking`), and probabilities are added up as integers, because a sum of floats depends on how a kernel splits it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pagebrain.sampling.ranking import best_tokens
from pagebrain.sampling.rows import SampleRow, per_row
from pagebrain.sampling_params import SamplingParams

FIRST_WIDTH = 1024
"""Tokens sorted at first for a row with top-p and without top-k. While they do not reach ``top_p``, eight times as many."""

WEIGHT_UNIT = 2.0**44
"""A token's probability relative to the best token's is rounded down to a multiple of 2**-44 to make it an integer.

Sums over fewer than 2**19 tokens fit in int64; the rounding is below the error of a float32 softmax.
"""


def limits_rank(params: SamplingParams, vocab_size: int) -> bool:
    """Whether top-k or top-p drops tokens, so that tokens must be sorted."""
    return 0 < params.top_k < vocab_size or params.top_p < 1.0


def apply_min_p(scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Scores with ``-inf`` for each token less probable than ``min_p`` times the best one.

    ``scores`` is ``[num_rows, vocab_size]`` with maximum 0 in each row, so that a score is the logarithm of that ratio.
    """
    if not any(row.params.min_p for row in rows):
        return scores
    lowest = [math.log(row.params.min_p) if row.params.min_p else -math.inf for row in rows]
    return scores.masked_fill(scores < per_row(lowest, scores.dtype, scores.device).unsqueeze(1), -math.inf)


def keep_top_k_top_p(scores: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
    """The best tokens of each row, as many as top-k and top-p keep; the best one always.

    Top-p keeps a token if the probabilities of the better ones add up to less than ``top_p``; with top-k, they are
    probabilities among the ``top_k`` best.

    Args:
        scores: ``[num_rows, vocab_size]`` with maximum 0 in each row.

    Returns:
        ``(kept, token_ids)``, both ``[num_rows, width]``, best first; ``kept`` is ``-inf`` where a token was dropped.
        ``width`` is the largest that a row needs.
    """
    vocab_size, device = scores.shape[1], scores.device
    limits = [row.params.top_k if 0 < row.params.top_k < vocab_size else vocab_size for row in rows]
    top_k = per_row(limits, torch.int64, device).unsqueeze(1)  # [num_rows, 1]
    top_p = per_row([row.params.top_p for row in rows], torch.float64, device).unsqueeze(1)

    if max(limits) < vocab_size:
        ordered, token_ids = best_tokens(scores, max(limits))
        dropped, _ = _dropped_ranks(ordered, top_k, top_p, None)
        return ordered.masked_fill(dropped, -math.inf), token_ids

    whole_weight = _weights(scores).sum(dim=1, keepdim=True)  # int64 [num_rows, 1]
    width = min(vocab_size, max(FIRST_WIDTH, *(limit for limit in limits if limit < vocab_size), 1))
    if scores.is_cuda:
        width = vocab_size  # a check whether fewer are enough would wait for the GPU
    while True:
        ordered, token_ids = best_tokens(scores, width)
        dropped, reached = _dropped_ranks(ordered, top_k, top_p, whole_weight)
        if width == vocab_size or bool(reached.all()):
            return ordered.masked_fill(dropped, -math.inf), token_ids
        width = min(vocab_size, 8 * width)


def _dropped_ranks(ordered: Tensor, top_k: Tensor, top_p: Tensor, whole_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which ranks of ``ordered`` are dropped (bool, same shape), and whether each row reaches its ``top_p`` within them.

    ``whole_weight`` is the weight of all tokens of the vocabulary, for rows without top-k.
    """
    beyond_k = torch.arange(ordered.shape[1], device=ordered.device) >= top_k
    weights = _weights(ordered).masked_fill(beyond_k, 0)  # int64 [num_rows, width]
    weight = weights.sum(dim=1, keepdim=True)
    limited = top_k <= ordered.shape[1]
    target = top_p * (weight if whole_weight is None else torch.where(limited, weight, whole_weight))
    better = weights.cumsum(dim=1) - weights  # the weight of all better tokens
    beyond_p = (better >= target) & (top_p < 1.0)
    return beyond_k | beyond_p, weight >= target


def _weights(scores: Tensor) -> Tensor:
    """Probabilities relative to the best token's, as integers: sums of them are exact in any order."""
    return (scores.exp() * WEIGHT_UNIT).to(torch.int64)
