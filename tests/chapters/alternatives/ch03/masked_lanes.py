"""Task 3.3: all lanes take part in every step, masked; terms are powers of two, values are summed by matrix products."""

LOG2_E = 1 / math.log(2)


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    highest, old, old_total, old_acc = scores.max(dim=-1).values, *partial
    grown = highest > old
    new = torch.where(grown, highest, old)
    factor = torch.where(grown, torch.exp2((old - new) * LOG2_E), 1.0)
    terms = torch.exp2((scores - new[..., None]) * LOG2_E)  # [..., num_heads, block_size]
    added = (terms[..., None, :] @ values.transpose(-3, -2)).squeeze(-2)  # [..., num_heads, head_dim]
    return Partial(new, factor * old_total + terms.sum(dim=-1), factor[..., None] * old_acc + added)


def attend_one(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Sequence[int], context_len: int, scale: float
) -> Tensor:
    partial, left, pages = Partial.start(query), context_len, iter(block_table)
    while left > 0:
        block = next(pages)
        keys, values = key_pool[block].narrow(0, 0, min(left, len(key_pool[block]))), value_pool[block][:left]
        partial = add_page(partial, scale * (keys.transpose(0, 1) @ query[..., None]).squeeze(-1), values)
        left -= len(keys)
    return torch.div(partial.acc, partial.total[:, None])


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    num_blocks, block_size, num_heads, head_dim = key_pool.shape
    lanes: list[tuple[int, int]] = []  # which sequence, how many tokens
    for seq, (count, length) in enumerate(zip(query_starts.diff().tolist(), context_lens.tolist())):
        lanes += [(seq, seen) for seen in range(length - count + 1, length + 1)]
    seqs, seen = (torch.tensor(column, device=query.device) for column in zip(*lanes))
    partial = Partial.start(query)
    for first in range(0, int(seen.max()), block_size):
        blocks = block_tables[:, first // block_size].clamp(0, num_blocks - 1)[seqs]
        scores = (key_pool[blocks].movedim(2, 1) @ query[..., None]).squeeze(
            -1
        ) * scale  # [num_tokens, num_heads, block_size]
        hidden = torch.arange(first, first + block_size, device=query.device)[None] >= seen[:, None]
        scores = torch.where(hidden[:, None], torch.full_like(scores, -math.inf), scores)
        partial = add_page(partial, scores, value_pool[blocks])
    return partial.acc / partial.total[..., None]


def answer_3_4() -> tuple[float, str]:
    return (
        49,
        "Each page starts its own small operations, and starting them costs more than their arithmetic. A kernel is one.",
    )
