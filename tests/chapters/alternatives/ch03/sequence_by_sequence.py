"""Task 3.3: sequences one after the other, for each of them its pages, and in each page all of its queries."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    old, new = partial.maximum, torch.cat([partial.maximum[..., None], scores], dim=-1).amax(dim=-1)
    weights = (scores - new[..., None]).exp()
    weighted = torch.matmul(weights[..., None, :], values.transpose(-3, -2)).squeeze(-2)  # [..., num_heads, head_dim]
    factor = (old - new).exp()
    return Partial(
        maximum=new,
        total=weights.sum(-1).addcmul(partial.total, factor),
        acc=weighted.addcmul(partial.acc, factor[..., None]),
    )


def attend_one(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Sequence[int], context_len: int, scale: float
) -> Tensor:
    # One lane of the general case.
    tables = torch.as_tensor(list(block_table), device=query.device)[None]
    lens = torch.tensor([context_len], device=query.device)
    starts = torch.tensor([0, 1], device=query.device)
    return paged_attention(query[None], key_pool, value_pool, tables, lens, starts, scale)[0]


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    block_size = key_pool.shape[1]
    out = torch.empty_like(query)
    starts = query_starts.tolist()
    for seq, context_len in enumerate(context_lens.tolist()):
        own = slice(starts[seq], starts[seq + 1])
        if own.start == own.stop:
            continue
        positions = torch.arange(context_len - (own.stop - own.start), context_len, device=query.device)  # [num_own]
        partial = Partial.start(query[own])
        for first in range(0, context_len, block_size):
            block_id = int(block_tables[seq, first // block_size])
            filled = min(block_size, context_len - first)
            scores = torch.einsum("nhd,khd->nhk", query[own], key_pool[block_id, :filled]) * scale
            later = torch.arange(first, first + filled, device=query.device) > positions[:, None]
            scores = scores.masked_fill(later[:, None], -math.inf)
            partial = add_page(partial, scores, value_pool[block_id, :filled].expand(len(positions), -1, -1, -1))
        out[own] = partial.acc / partial.total[..., None]
    return out


def answer_3_4() -> tuple[float, str]:
    return (
        46,
        "Each page starts its own small operations, and starting them costs more than their arithmetic. A kernel is one.",
    )
