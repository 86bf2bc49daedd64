"""Task 3.3: a lane's last page is cut at the remainder of its length, which is 0 when the page is full."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    query_lens = query_starts.diff()
    seq_of_lane = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens)
    from_end = query_starts[1:][seq_of_lane] - torch.arange(len(query)) - 1
    lens = context_lens[seq_of_lane] - from_end
    last_page = (lens - 1) // block_size
    partial = Partial.start(query)
    for page in range(int(last_page.max()) + 1):
        lanes = torch.nonzero(last_page >= page).flatten()
        block_ids = block_tables[seq_of_lane[lanes], page]
        scores = torch.einsum("nhd,nkhd->nhk", query[lanes], key_pool[block_ids]) * scale
        filled = torch.where(last_page[lanes] == page, lens[lanes] % block_size, block_size)
        scores = scores.masked_fill((torch.arange(block_size) >= filled[:, None])[:, None], -math.inf)
        after = add_page(Partial(*(tensor[lanes] for tensor in partial)), scores, value_pool[block_ids])
        for whole, part in zip(partial, after):
            whole[lanes] = part
    return partial.acc / partial.total.unsqueeze(-1)
