"""Task 3.2: page number and block number are taken for the same."""


def attend_one(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Sequence[int], context_len: int, scale: float
) -> Tensor:
    block_size = key_pool.shape[1]
    partial = Partial.start(query)
    for page in range(-(-context_len // block_size)):
        filled = min(block_size, context_len - page * block_size)
        scores = torch.einsum("hd,khd->hk", query, key_pool[page, :filled]) * scale
        partial = add_page(partial, scores, value_pool[page, :filled])
    return partial.acc / partial.total.unsqueeze(-1)
