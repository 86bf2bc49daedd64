"""Task 3.3: only a sequence's first chunk is masked causally; a later chunk's queries see all of their own chunk."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    query_lens = query_starts.diff()
    lens = []
    for count, length in zip(query_lens.tolist(), context_lens.tolist()):
        lens += range(1, count + 1) if count == length else [length] * count
    lens = torch.tensor(lens)
    seq_of_lane = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens)
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seq_of_lane, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)
