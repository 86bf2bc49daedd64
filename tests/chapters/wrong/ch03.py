"""Wrong solutions of chapter 03. ``# %%`` names each, its docstring the task and the mistake."""

# %% accumulator_not_rescaled
"""Task 3.1: a new maximum shrinks the total but not the accumulator."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.max(dim=-1).values)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * torch.exp(partial.maximum - maximum) + weights.sum(dim=-1)
    acc = partial.acc + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% first_maximum_kept
"""Task 3.1: the first page's maximum is kept, so that nothing is rescaled and large scores of a later page overflow."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.where(partial.maximum.isinf(), scores.amax(dim=-1), partial.maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total + weights.sum(dim=-1)
    acc = partial.acc + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% maximum_at_least_zero
"""Task 3.1: the maximum starts at zero, so that very negative scores all vanish."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    before = torch.nan_to_num(partial.maximum, neginf=0.0)
    maximum = torch.maximum(before, scores.amax(dim=-1))
    shrink = torch.exp(before - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% maximum_of_this_page
"""Task 3.1: the maximum is that of the newest page alone, minus infinity if none of its slots can be seen."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = scores.amax(dim=-1)
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% no_maximum
"""Task 3.1: nothing is subtracted before the exponential; the maximum is only noted."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    weights = torch.exp(scores)
    total = partial.total + weights.sum(dim=-1)
    acc = partial.acc + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% one_maximum_for_all
"""Task 3.1: all queries and heads share one maximum, so that those with much smaller scores vanish."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.max())
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% partial_changed_in_place
"""Task 3.1: the sums of the pages before are changed in place, under the caller's hands."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    partial.total.mul_(shrink).add_(weights.sum(dim=-1))
    partial.acc.mul_(shrink.unsqueeze(-1)).add_(torch.einsum("...hk,...khd->...hd", weights, values))
    return Partial(maximum, partial.total, partial.acc)


# %% shrink_inverted
"""Task 3.1: what was summed before grows with a new maximum in place of shrinking."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp(maximum - partial.maximum).nan_to_num(posinf=0.0)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% total_not_rescaled
"""Task 3.1: a new maximum shrinks the accumulator but not the total."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% last_page_not_cut
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


# %% one_page_too_many
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


# %% own_token_unseen
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


# %% pages_averaged
"""Task 3.2: each page gets a softmax of its own, and the results are averaged."""


def attend_one(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Sequence[int], context_len: int, scale: float
) -> Tensor:
    block_size = key_pool.shape[1]
    out = torch.zeros_like(query)
    for start in range(0, context_len, block_size):
        filled = min(block_size, context_len - start)
        block_id = block_table[start // block_size]
        weights = (torch.einsum("hd,khd->hk", query, key_pool[block_id, :filled]) * scale).softmax(dim=-1)
        out += torch.einsum("hk,khd->hd", weights, value_pool[block_id, :filled]) * filled / context_len
    return out


# %% table_ignored
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


# %% whole_table_followed
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


# %% chunk_sees_itself_whole
"""Task 3.3: all queries of a sequence see its whole context, tokens after their own included."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    query_lens = query_starts.diff()
    seq_of_lane = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens)
    lens = context_lens[seq_of_lane]
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seq_of_lane, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)


# %% first_row_of_the_next
"""Task 3.3: a sequence's first row is counted with the sequence before it."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    rows = torch.arange(len(query))
    seq_of_lane = torch.bucketize(rows, query_starts[1:])
    lens = context_lens[seq_of_lane] - (query_starts[seq_of_lane + 1] - 1 - rows)
    partial = Partial.start(query)
    for page in range(-(-int(context_lens.max()) // block_size)):
        block_ids = block_tables[seq_of_lane, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)


# %% full_last_page_hidden
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


# %% later_chunk_counts_from_zero
"""Task 3.3: the queries of a prefill are numbered from zero, so that a later chunk sees too little."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    query_lens = query_starts.diff()
    seq_of_lane = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens)
    index = torch.arange(len(query)) - query_starts[seq_of_lane]
    lens = torch.where(query_lens[seq_of_lane] > 1, index + 1, context_lens[seq_of_lane])
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seq_of_lane, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)


# %% later_chunk_not_causal
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


# %% masked_in_the_last_step_only
"""Task 3.3: only the step of the very last page masks, lanes whose context ends earlier are not cut."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    query_lens = query_starts.diff()
    seq_of_lane = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens)
    from_end = query_starts[1:][seq_of_lane] - torch.arange(len(query)) - 1
    lens = context_lens[seq_of_lane] - from_end
    num_pages = -(-int(lens.max()) // block_size)
    partial = Partial.start(query)
    for page in range(num_pages):
        block_ids = block_tables[seq_of_lane, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        if page == num_pages - 1:
            positions = page * block_size + torch.arange(block_size)
            scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)


# %% pages_of_the_last_lane
"""Task 3.3: the loop runs over the pages of the last lane, though another one may have more."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    query_lens = query_starts.diff()
    seq_of_lane = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens)
    from_end = query_starts[1:][seq_of_lane] - torch.arange(len(query)) - 1
    lens = context_lens[seq_of_lane] - from_end
    partial = Partial.start(query)
    for page in range(-(-int(lens[-1]) // block_size)):
        block_ids = block_tables[seq_of_lane, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)


# %% scale_ignored
"""Task 3.3: the scores are always divided by the root of head_dim, and the caller's scale is not used."""


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


# %% unused_slots_cleared
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


# %% waiting_lanes_see_one
"""Task 3.3: a lane that has no such page is left one slot to see, lest the softmax be empty."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    query_lens = query_starts.diff()
    seq_of_lane = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens)
    from_end = query_starts[1:][seq_of_lane] - torch.arange(len(query)) - 1
    lens = context_lens[seq_of_lane] - from_end
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seq_of_lane, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        filled = (lens - page * block_size).clamp(min=1, max=block_size)
        scores = scores.masked_fill((torch.arange(block_size) >= filled[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)
