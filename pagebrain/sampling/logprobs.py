"""Log-probabilities for users: of the chosen token and of the most probable ones.

They are those of the model's own distribution: of its logits before penalties, temperature and truncation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagebrain.outputs import TokenLogprobs
from pagebrain.sampling.ranking import best_tokens
from pagebrain.sampling.rows import per_row

SCORED_TOGETHER = {"cuda": 1024, "cpu": 64}
"""Prompt tokens that are scored at once, by device."""


@dataclass(frozen=True, eq=False)
class LogprobsTensors:
    """Log-probabilities of one step on the device. Only :meth:`to_list` waits for them.

    ``num_top`` has an entry for each row of the step: how many of the most probable tokens are wanted, ``None`` for no
    log-probabilities. The tensors have a row for each entry that is not ``None``.
    """

    num_top: tuple[int | None, ...]
    token_ids: Tensor  # int64 [num_scored]
    logprobs: Tensor  # float [num_scored]
    ranks: Tensor  # int64 [num_scored]
    top_token_ids: Tensor  # int64 [num_scored, max(num_top)]
    top_logprobs: Tensor  # float [num_scored, max(num_top)]

    def to_list(self) -> list[TokenLogprobs | None]:
        """One entry for each row of the step, ``None`` where none is wanted. Waits for the device."""
        columns = (self.token_ids, self.logprobs, self.ranks, self.top_token_ids, self.top_logprobs)
        scored = zip(*(column.tolist() for column in columns), strict=True)
        entries: list[TokenLogprobs | None] = []
        for num_top in self.num_top:
            if num_top is None:
                entries.append(None)
                continue
            token_id, logprob, rank, top_token_ids, top_logprobs = next(scored)
            top = tuple(zip(top_token_ids[:num_top], top_logprobs[:num_top], strict=True))
            entries.append(TokenLogprobs(token_id, logprob, rank, top))
        return entries


def gather_logprobs(logits: Tensor, token_ids: Tensor, num_top: Sequence[int | None]) -> LogprobsTensors:
    """Log-probabilities of one token in each row.

    Args:
        logits: ``[num_rows, vocab_size]`` as the model gave them, of any float dtype; computed in float32 at least.
        token_ids: int64 ``[num_rows]``.
        num_top: for each row how many of the most probable tokens to add, ``None`` to leave the row out.

    A token's rank is its place, from 1, in the order by logit; equal logits are ordered by token id.
    """
    scored = [i for i, count in enumerate(num_top) if count is not None]
    if len(scored) < len(num_top):
        index = per_row(scored, torch.int64, logits.device)
        logits, token_ids = logits[index], token_ids[index]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = torch.log_softmax(logits, dim=1)
    column = token_ids.unsqueeze(1)  # [num_scored, 1]
    chosen = logits.gather(1, column)
    ids = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > chosen) | ((logits == chosen) & (ids < column))
    width = min(max((count or 0 for count in num_top), default=0), logits.shape[1])
    top_token_ids = best_tokens(logits, width)[1] if width else column[:, :0]
    return LogprobsTensors(
        num_top=tuple(num_top),
        token_ids=token_ids,
        logprobs=logprobs.gather(1, column).squeeze(1),
        ranks=ahead.sum(dim=1) + 1,
        top_token_ids=top_token_ids,
        top_logprobs=logprobs.gather(1, top_token_ids),
    )


def score_prompt(logits: Tensor, token_ids: Tensor, num_top: int) -> list[LogprobsTensors]:
    """Log-probabilities of prompt tokens ``[num_tokens]``, on the device, in pieces; row ``i`` predicts token ``i``.

    Each row needs several float32 copies of 200 kB, and a step may score thousands of rows, so it is done in pieces.
    """
    together = SCORED_TOGETHER[logits.device.type]
    pieces = zip(torch.split(logits, together), torch.split(token_ids, together), strict=True)
    return [gather_logprobs(some_logits, ids, [num_top] * len(ids)) for some_logits, ids in pieces]


def prompt_logprobs(scored: Sequence[LogprobsTensors]) -> list[TokenLogprobs]:
    """The result of :func:`score_prompt` as one entry for each token. Waits for the device."""
    return [entry for piece in scored for entry in piece.to_list() if entry is not None]
