"""Checks the positions that a caller of the model gives, before anything is changed."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pagebrain.errors import InvalidRequestError


@dataclass(frozen=True)
class RowPlan:
    """One row of the batch: ``num_new`` tokens of sequence ``seq_id`` after ``num_cached`` cached ones."""

    seq_id: int
    num_cached: int
    num_new: int

    @property
    def context_len(self) -> int:
        """Tokens in the cache after the row was computed."""
        return self.num_cached + self.num_new


def plan_rows(
    input_ids: Tensor,
    input_pos: Tensor,
    cache_pos: Tensor,
    seq_ids: Iterable[int] | None,
    num_cached: Mapping[int, int],
    vocab_size: int,
    num_positions: int,
) -> list[RowPlan]:
    """The rows of a call. ``num_cached`` is the number of tokens in the cache for each sequence.

    Raises ``InvalidRequestError`` with the argument and the row that is wrong.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise InvalidRequestError(f"input_ids must be integers [B, T], got {input_ids.dtype} {list(input_ids.shape)}")
    num_rows, width = input_ids.shape
    for name, pairs in (("input_pos", input_pos), ("cache_pos", cache_pos)):
        if not isinstance(pairs, Tensor) or list(pairs.shape) != [num_rows, 2] or pairs.is_floating_point():
            got = f"{pairs.dtype} {list(pairs.shape)}" if isinstance(pairs, Tensor) else repr(pairs)
            raise InvalidRequestError(f"{name} must be an integer tensor [{num_rows}, 2], got {got}")
    ids = list(range(num_rows)) if seq_ids is None else [operator.index(seq_id) for seq_id in seq_ids]
    if len(ids) != num_rows or len(set(ids)) != num_rows:
        raise InvalidRequestError(f"seq_ids must name {num_rows} different sequences, got {ids}")
    if num_rows == 0:
        raise InvalidRequestError("input_ids must have at least one row, got 0")

    rows = []
    for index, (seq_id, (start, count), (first, cached)) in enumerate(zip(ids, input_pos.tolist(), cache_pos.tolist())):
        if first != 0:
            raise InvalidRequestError(f"cache_pos[{index}] starts at position {first}: the cache of a sequence starts at 0")
        if not 0 <= cached <= num_cached.get(seq_id, 0):
            raise InvalidRequestError(
                f"cache_pos[{index}] claims {cached} cached tokens, but sequence {seq_id} has {num_cached.get(seq_id, 0)}"
            )
        if start != cached:
            raise InvalidRequestError(
                f"input_pos[{index}] starts at {start}, but {cached} tokens are cached: start at {cached}"
            )
        if not 1 <= count <= width:
            raise InvalidRequestError(f"input_pos[{index}] names {count} new tokens: expected 1 to {width}, the row's width")
        if start + count > num_positions:
            raise InvalidRequestError(
                f"row {index} would reach position {start + count - 1}, but the model's last is {num_positions - 1}"
            )
        rows.append(RowPlan(seq_id, cached, count))

    for index, row in enumerate(rows):
        new = input_ids[index, : row.num_new]
        if bool(torch.any((new < 0) | (new >= vocab_size))):
            raise InvalidRequestError(f"input_ids[{index}] holds token ids outside 0..{vocab_size - 1}: {new.tolist()}")
    return rows
