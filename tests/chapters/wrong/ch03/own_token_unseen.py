"""Task 3.2: the query sees the tokens before its own, but not its own."""


def attend_one(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Sequence[int], context_len: int, scale: float
) -> Tensor:
    block_size = key_pool.shape[1]
    partial = Partial.start(query)
    position = context_len - 1
    for page in range(position // block_size + 1):
        end = min(block_size, position - page * block_size)
        if end > 0:
            keys, values = key_pool[block_table[page], :end], value_pool[block_table[page], :end]
            partial = add_page(partial, torch.einsum("hd,khd->hk", query, keys) * scale, values)
    return partial.acc / partial.total.unsqueeze(-1)
