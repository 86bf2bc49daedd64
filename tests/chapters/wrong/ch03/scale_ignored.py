"""Task 3.3: the scores are divided by the root of head_dim, whatever scale the caller gives."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    query_lens = query_starts.diff()
    seq_of_lane = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens)
    from_end = query_starts[1:][seq_of_lane] - torch.arange(len(query)) - 1
    lens = context_lens[seq_of_lane] - from_end
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seq_of_lane, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) / math.sqrt(query.shape[-1])
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)
