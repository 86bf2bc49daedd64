r"""Paged attention in torch operations: the online softmax over pages, for many sequences at once.

For one query q the answer is softmax(q K^T) V over the whole context, but K and V are read a few pages at a time. Three
numbers carry over from page to page: the largest score so far m, the sum l of exp(score - m), and the unnormalised output
acc. When a new page brings a larger maximum m', what was summed before is scaled by exp(m - m'):

    l   <- l * exp(m - m') + sum_j exp(s_j - m')
    acc <- acc * exp(m - m') + sum_j exp(s_j - m') v_j

and the output is acc / l (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
"FlashAttention", 2022). At most ``pages_per_step`` pages are gathered at a time, for a context of any length.

:class:`TorchBackend` is the backend around it, for every device and dtype. :class:`FunctionBackend` is the backend around a
function that the user wrote.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pagebrain.attention.batch import ForwardBatch
from pagebrain.attention.kv_pool import KVPool

DEFAULT_PAGES_PER_STEP = 64


@dataclass
class _Lanes:
    """Sequences with equally many queries, ordered by context length, longest first.

    So the lanes that still have pages to read are always the first ones: a slice selects them, without an index.
    """

    rows: Tensor  # int64 [num_lanes, query_len]: each query's row in the flat batch
    tables: Tensor  # int64 [num_lanes, max_blocks]
    context_lens: Tensor  # int64 [num_lanes]
    num_pages: list[int]


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    *,
    pages_per_step: int = DEFAULT_PAGES_PER_STEP,
) -> Tensor:
    """Causal attention of each sequence's newest tokens over all its tokens, read through its block table.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``; the rows of sequence ``i`` are
            ``query_starts[i] .. query_starts[i + 1] - 1`` and are its last tokens.
        key_pool, value_pool: ``[num_blocks, block_size, num_heads, head_dim]``, any strides.
        block_tables: int64 ``[num_seqs, max_blocks]``; entries after a sequence's pages are not read.
        context_lens: int64 ``[num_seqs]``, tokens cached plus tokens of this step.
        query_starts: int64 ``[num_seqs + 1]``.
        scale: factor on the scores.
        pages_per_step: largest number of pages gathered at a time, over all sequences. With 1 this is the textbook loop,
            sequence by sequence and page by page. Larger values read pages of many sequences, or many pages of one, at once.

    Returns:
        ``[num_tokens, num_heads, head_dim]`` in the query's dtype; scores and sums are kept in float32 at least.
    """
    out = torch.empty_like(query)
    for lanes in _lanes(block_tables, context_lens, query_starts, key_pool.shape[1], pages_per_step):
        out[lanes.rows] = _attend(query[lanes.rows], key_pool, value_pool, lanes, scale, pages_per_step).to(query.dtype)
    return out


paged_attention.supports = frozenset({"async_scheduling"})  # type: ignore[attr-defined]


def write_kv(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor) -> None:
    """Write K and V ``[num_tokens, num_heads, head_dim]`` of new tokens to their slots ``[num_tokens]``."""
    blocks, offsets = slot_mapping // key_pool.shape[1], slot_mapping % key_pool.shape[1]
    key_pool[blocks, offsets] = key
    value_pool[blocks, offsets] = value


def _lanes(
    block_tables: Tensor, context_lens: Tensor, query_starts: Tensor, block_size: int, pages_per_step: int
) -> Iterator[_Lanes]:
    """Sort sequences into lanes: same query length together, longest context first, at most ``pages_per_step`` at once."""
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    by_query_len: dict[int, list[int]] = {}
    for index in range(len(contexts)):
        by_query_len.setdefault(starts[index + 1] - starts[index], []).append(index)
    for query_len, members in by_query_len.items():
        if query_len == 0:
            continue
        members.sort(key=contexts.__getitem__, reverse=True)
        for first in range(0, len(members), pages_per_step):
            chosen = members[first : first + pages_per_step]
            seqs = torch.tensor(chosen, device=block_tables.device)
            rows = query_starts[seqs].unsqueeze(1) + torch.arange(query_len, device=block_tables.device)
            num_pages = [-(-contexts[index] // block_size) for index in chosen]
            yield _Lanes(rows, block_tables[seqs], context_lens[seqs], num_pages)


def _attend(query: Tensor, key_pool: Tensor, value_pool: Tensor, lanes: _Lanes, scale: float, pages_per_step: int) -> Tensor:
    """The online softmax for lanes side by side; query and result ``[num_lanes, query_len, num_heads, head_dim]``."""
    num_lanes, query_len, num_heads, _ = query.shape
    block_size = key_pool.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = (query.to(dtype) * scale).transpose(1, 2)  # [num_lanes, num_heads, query_len, head_dim]
    # Query i of a lane is at position context_len - query_len + i and attends to the positions up to its own.
    positions = lanes.context_lens.unsqueeze(1) - query_len + torch.arange(query_len, device=query.device)
    running_max = q.new_full((num_lanes, num_heads, query_len, 1), -torch.inf)
    running_sum = q.new_zeros((num_lanes, num_heads, query_len, 1))
    acc = torch.zeros_like(q)

    page, active = 0, num_lanes
    while active:
        width = min(max(1, pages_per_step // active), lanes.num_pages[0] - page)
        block_ids = lanes.tables[:active, page : page + width]
        k = _gather(key_pool, block_ids).to(dtype)  # [active, num_heads, width * block_size, head_dim]
        v = _gather(value_pool, block_ids).to(dtype)
        scores = torch.matmul(q[:active], k.transpose(-1, -2))  # [active, num_heads, query_len, width * block_size]
        # Most pages need no mask: every query of every lane attends to all of their tokens.
        last_key = (page + width) * block_size - 1
        if last_key > int(positions[:active].min()):
            keys = torch.arange(page * block_size, last_key + 1, device=query.device)
            hidden = keys > positions[:active, :, None]  # [active, query_len, width * block_size]
            scores.masked_fill_(hidden.unsqueeze(1), -torch.inf)

        new_max = torch.maximum(running_max[:active], scores.amax(-1, keepdim=True))
        rescale = torch.exp(running_max[:active] - new_max)
        weights = torch.exp(scores.sub_(new_max))
        running_sum[:active] = running_sum[:active] * rescale + weights.sum(-1, keepdim=True)
        acc[:active] = acc[:active] * rescale + torch.matmul(weights, v)
        running_max[:active] = new_max

        page += width
        while active and lanes.num_pages[active - 1] <= page:
            active -= 1
    return (acc / running_sum).transpose(1, 2)


def _gather(pool: Tensor, block_ids: Tensor) -> Tensor:
    """The pages ``[num_lanes, width]`` of a pool, head by head: ``[num_lanes, num_heads, width * block_size, head_dim]``."""
    by_head = pool.transpose(1, 2)  # [num_blocks, num_heads, block_size, head_dim]
    _, num_heads, block_size, head_dim = by_head.shape
    num_lanes, width = block_ids.shape
    if by_head.is_contiguous():
        # One head's part of a page is contiguous, so index_select gives the parts in the order of the result.
        runs = block_ids.unsqueeze(1) * num_heads + torch.arange(num_heads, device=pool.device).view(1, -1, 1)
        pages = by_head.view(-1, block_size, head_dim).index_select(0, runs.flatten())
    else:
        pages = by_head.index_select(0, block_ids.flatten()).view(num_lanes, width, num_heads, block_size, head_dim)
        pages = pages.transpose(1, 2)
    return pages.reshape(num_lanes, num_heads, width * block_size, head_dim)


class FunctionBackend:
    """Torch operations write K and V, and a function like :func:`~pagebrain.attention.paged_attention` reads them.

    It supports the features in ``function.supports``, if there is such an attribute, without ``batch_rows``: the function
    does not get ``active_rows``.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.supports: frozenset[str] = frozenset(getattr(function, "supports", ())) - {"batch_rows"}

    def write(self, layer: int, pool: KVPool, key: Tensor, value: Tensor, batch: ForwardBatch) -> None:
        """See :class:`~pagebrain.attention.backend.AttentionBackend`."""
        write_kv(key, value, pool.key_pools[layer], pool.value_pools[layer], batch.slot_mapping)

    def attend(self, layer: int, query: Tensor, pool: KVPool, batch: ForwardBatch, scale: float) -> Tensor:
        """See :class:`~pagebrain.attention.backend.AttentionBackend`."""
        pools = pool.key_pools[layer], pool.value_pools[layer]
        return self.function(query, *pools, batch.block_tables, batch.context_lens, batch.query_starts, scale)

    @staticmethod
    def reason_against(*model: object) -> None:
        """``None``: a function raises its own errors."""


class TorchBackend(FunctionBackend):
    """The engine's attention on devices without the Triton kernels."""

    def __init__(self) -> None:
        super().__init__(paged_attention)
