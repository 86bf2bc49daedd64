"""Task 3.2: a context that fills its pages exactly is followed one page further."""


def attend_one(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Sequence[int], context_len: int, scale: float
) -> Tensor:
    block_size = key_pool.shape[1]
    partial = Partial.start(query)
    for page in range(context_len // block_size + 1):
        block_id = block_table[page]
        scores = torch.einsum("hd,khd->hk", query, key_pool[block_id]) * scale
        scores[:, max(0, context_len - page * block_size) :] = -math.inf
        partial = add_page(partial, scores, value_pool[block_id])
    return partial.acc / partial.total.unsqueeze(-1)
