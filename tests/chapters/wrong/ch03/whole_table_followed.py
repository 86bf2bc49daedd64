"""Task 3.2: all entries of the table are followed, those past the context too, and only then masked."""


def attend_one(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Sequence[int], context_len: int, scale: float
) -> Tensor:
    block_size = key_pool.shape[1]
    partial = Partial.start(query)
    for page, block_id in enumerate(block_table):
        scores = torch.einsum("hd,khd->hk", query, key_pool[block_id]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill(positions >= context_len, -math.inf)
        partial = add_page(partial, scores, value_pool[block_id])
    return partial.acc / partial.total.unsqueeze(-1)
