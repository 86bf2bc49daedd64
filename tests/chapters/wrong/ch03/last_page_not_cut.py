"""Task 3.2: all slots of the last page are read, filled or not."""


def attend_one(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Sequence[int], context_len: int, scale: float
) -> Tensor:
    block_size = key_pool.shape[1]
    partial = Partial.start(query)
    for block_id in block_table[: -(-context_len // block_size)]:
        scores = torch.einsum("hd,khd->hk", query, key_pool[block_id]) * scale
        partial = add_page(partial, scores, value_pool[block_id])
    return partial.acc / partial.total.unsqueeze(-1)
