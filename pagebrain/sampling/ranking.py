"""The best tokens of each row in order; equal scores by token id, lower first, on every device.

``torch.topk`` and ``torch.sort`` do not define the order of equal scores. A stable sort does, but it must sort the whole
row. Equal scores are common: bfloat16 logits around -40 are 0.25 apart. So score and token id are packed into one integer,
and all integers of a row differ.
"""

import torch
from torch import Tensor


def best_tokens(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` best tokens of each row.

    Args:
        scores: float32 or float64 ``[num_rows, vocab_size]``, without NaN.
        width: 1 to ``vocab_size``.

    Returns:
        ``(scores, token_ids)``, both ``[num_rows, width]``, best first.
    """
    if scores.dtype != torch.float32:  # a float64 score leaves no bits for the token id
        ordered, token_ids = torch.sort(scores, dim=1, descending=True, stable=True)
        return ordered[:, :width], token_ids[:, :width]
    vocab_size = scores.shape[1]
    bits = (scores + 0.0).view(torch.int32)  # adding 0.0 turns -0.0 into 0.0, which compares equal to it
    # As integers, floats of either sign are in order once all bits but the sign of the negative ones are flipped.
    keys = (bits ^ ((bits >> 31) & 0x7FFF_FFFF)).to(torch.int64)
    keys *= 1 << 32
    keys += torch.arange(vocab_size - 1, -1, -1, device=scores.device)
    all_of_them = width == vocab_size
    best = (torch.sort(keys, dim=1, descending=True) if all_of_them else torch.topk(keys, width, dim=1)).values
    token_ids = vocab_size - 1 - (best & 0xFFFF_FFFF)
    return scores.gather(1, token_ids), token_ids
