"""Changes to the logits that can change which token is the most probable: penalties, logit bias, ``min_tokens``.

They are applied before temperature, in this order. Formulas: repetition penalty from Keskar et al., "CTRL" (2019), presence
and frequency penalty as in OpenAI's API; the same as in vLLM and Hugging Face.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pagebrain.sampling.rows import SampleRow, per_row


def needs_adjustment(row: SampleRow) -> bool:
    """Whether :func:`adjust_logits` would change this row."""
    params = row.params
    return params.has_penalties or bool(params.logit_bias) or row.output_position < params.min_tokens


def adjust_logits(logits: Tensor, rows: Sequence[SampleRow], eos_token_ids: tuple[int, ...]) -> Tensor:
    """Logits ``[num_rows, vocab_size]`` after penalties, bias and ``min_tokens``. The argument is not changed."""
    if not any(needs_adjustment(row) for row in rows):
        return logits
    adjusted = logits.clone()
    _apply_penalties_(adjusted, rows)
    _apply_logit_bias_(adjusted, rows)
    _mask_early_stops_(adjusted, rows, eos_token_ids)
    return adjusted


def _apply_penalties_(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    members = [i for i, row in enumerate(rows) if row.params.has_penalties]
    if not members:
        return
    device, vocab_size = logits.device, logits.shape[1]
    penalised = [rows[i] for i in members]

    def column(values: list[float]) -> Tensor:
        return per_row(values, logits.dtype, device).unsqueeze(1)

    repetition = column([row.params.repetition_penalty for row in penalised])
    frequency = column([row.params.frequency_penalty for row in penalised])
    presence = column([row.params.presence_penalty for row in penalised])
    seen = _count_tokens([row.history for row in penalised], vocab_size) > 0
    output_counts = _count_tokens([row.history[row.num_prompt_tokens :] for row in penalised], vocab_size)

    index = per_row(members, torch.int64, device)
    scores = logits[index]  # [num_penalised, vocab_size]
    # A penalty above 1 must make a token less probable for either sign of its logit.
    scores = torch.where(seen, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
    scores -= frequency * output_counts
    scores -= presence * (output_counts > 0)
    logits[index] = scores


def _count_tokens(histories: list[Tensor], vocab_size: int) -> Tensor:
    """How often each token occurs in each history: int64 ``[len(histories), vocab_size]``."""
    # Padding is counted as a token past the vocabulary, and its column is cut off.
    tokens = pad_sequence(histories, batch_first=True, padding_value=float(vocab_size))
    counts = tokens.new_zeros(len(histories), vocab_size + 1)
    counts.scatter_add_(1, tokens, torch.ones_like(tokens))
    return counts[:, :vocab_size]


def _apply_logit_bias_(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    entries = [(i, token_id, value) for i, row in enumerate(rows) for token_id, value in row.params.logit_bias.items()]
    if not entries:
        return
    row_index, token_ids, values = (list(column) for column in zip(*entries, strict=True))
    where = (per_row(row_index, torch.int64, logits.device), per_row(token_ids, torch.int64, logits.device))
    logits[where] += per_row(values, logits.dtype, logits.device)  # no (row, token) occurs twice


def _mask_early_stops_(logits: Tensor, rows: Sequence[SampleRow], eos_token_ids: tuple[int, ...]) -> None:
    """While a sample has fewer than ``min_tokens`` tokens, no token that would end it can be drawn."""
    entries: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        if row.output_position < row.params.min_tokens:
            entries += [(i, token_id) for token_id in row.params.stop_token_ids]
            if not row.params.ignore_eos:
                entries += [(i, token_id) for token_id in eos_token_ids]
    if entries:
        where = per_row(entries, torch.int64, logits.device)
        # A tensor made on the device: a Python number would be copied there, and the copy waits for the GPU.
        logits[where[:, 0], where[:, 1]] = logits.new_full((), float("-inf"))
