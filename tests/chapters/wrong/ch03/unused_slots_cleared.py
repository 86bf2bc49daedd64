"""Task 3.3: slots that a sequence has not filled are cleared in the pools, which are there to be read only."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    for table, length in zip(block_tables.tolist(), context_lens.tolist()):
        if length % block_size:
            last = table[length // block_size]
            key_pool[last, length % block_size :] = 0
            value_pool[last, length % block_size :] = 0
    out = []
    for seq, length in enumerate(context_lens.tolist()):
        first, end = query_starts[seq : seq + 2].tolist()
        for row in range(first, end):
            out.append(attend_one(query[row], key_pool, value_pool, block_tables[seq], length - (end - 1 - row), scale))
    return torch.stack(out)
