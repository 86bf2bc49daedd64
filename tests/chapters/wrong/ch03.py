"""Wrong solutions of chapter 03. ``# %%`` names each, its docstring the task and the mistake."""

# %% accumulator_not_rescaled
"""Task 3.1: a new maximum shrinks the total but not the accumulator."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.max(dim=-1).values)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * torch.exp(partial.maximum - maximum) + weights.sum(dim=-1)
    acc = partial.acc + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% changed_in_place_without_a_new_maximum
"""Task 3.1: the sums stay in place while the maximum does not rise."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    if torch.equal(maximum, partial.maximum):
        weights = torch.exp(scores - maximum.unsqueeze(-1))
        partial.total.add_(weights.sum(dim=-1))
        partial.acc.add_(torch.einsum("...hk,...khd->...hd", weights, values))
        return partial
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% double_result_page
"""Task 3.1: sums in float64 whatever the dtype, and the result stays float64."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    scores, values = scores.double(), values.double()
    maximum = torch.maximum(partial.maximum.double(), scores.amax(dim=-1))
    shrink = torch.exp(partial.maximum.double() - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% epsilon_in_total
"""Task 3.1: a small number keeps the total from being zero."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(dim=-1) + 1e-6
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% exponent_clamped
"""Task 3.1: exponents are cut at minus fifty, so that hidden slots keep a little weight."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp((partial.maximum - maximum).clamp(min=-50))
    weights = torch.exp((scores - maximum.unsqueeze(-1)).clamp(min=-50))
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% exponentials_in_float32
"""Task 3.1: the exponentials are taken in float32."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp((partial.maximum - maximum).float()).to(scores.dtype)
    weights = torch.exp((scores - maximum.unsqueeze(-1)).float()).to(scores.dtype)
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% first_maximum_kept
"""Task 3.1: the first page's maximum is kept, so that nothing is rescaled and large scores of a later page overflow."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.where(partial.maximum.isinf(), scores.amax(dim=-1), partial.maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total + weights.sum(dim=-1)
    acc = partial.acc + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% hidden_slots_score_a_number
"""Task 3.1: minus infinity becomes minus ten thousand, so that scores below are beaten by hidden slots."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    scores = scores.nan_to_num(neginf=-1e4)
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
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


# %% maximum_before_the_mask_of_zero
"""Task 3.1: the maximum is found before the hidden slots are taken out: hidden slots count in the maximum as zero."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.nan_to_num(neginf=0.0).amax(dim=-1))
    shrink = torch.exp(partial.maximum - maximum)
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


# %% rescaled_only_if_all_rise
"""Task 3.1: what was summed is corrected only if the maximum of every query and head rises."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    page = scores.amax(dim=-1)
    maximum = torch.maximum(partial.maximum, page)
    shrink = torch.exp(partial.maximum - maximum) if bool((page > partial.maximum).all()) else torch.ones_like(maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% scores_changed_in_place
"""Task 3.1: the scores that were given become the weights."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp(partial.maximum - maximum)
    weights = scores.sub_(maximum.unsqueeze(-1)).exp_()
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% scores_cut_at_a_thousand
"""Task 3.1: scores and maxima are cut at a thousand, as if no score were ever larger."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    scores = scores.clamp(max=1000.0)
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)


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


# %% answers_kept
"""Task 3.2: the pages of a table are collected once and kept for later calls."""

_KEPT: dict = {}


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    block_size = key_pool.shape[1]
    partial = Partial.start(query)
    for page in range(-(-context_len // block_size)):
        filled = min(block_size, context_len - page * block_size)
        place = (key_pool.data_ptr(), block_table[page], filled)
        if place not in _KEPT:
            _KEPT[place] = key_pool[block_table[page], :filled].clone(), value_pool[block_table[page], :filled].clone()
        keys, values = _KEPT[place]
        partial = add_page(partial, torch.einsum("hd,khd->hk", query, keys) * scale, values)
    return partial.acc / partial.total.unsqueeze(-1)


# %% concatenated_page_by_page
"""Task 3.2: keys and values grow by a page in each turn, and are used at the end."""


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    block_size = key_pool.shape[1]
    keys, values = key_pool[block_table[0]], value_pool[block_table[0]]
    for page in range(1, -(-context_len // block_size)):
        keys = torch.cat([keys, key_pool[block_table[page]]])
        values = torch.cat([values, value_pool[block_table[page]]])
    weights = (torch.einsum("hd,khd->hk", query, keys[:context_len]) * scale).softmax(dim=-1)
    return torch.einsum("hk,khd->hd", weights, values[:context_len])


# %% context_gathered_one
"""Task 3.2: the whole context is gathered, and one ordinary softmax does the rest."""


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    pages = torch.tensor(list(block_table)[: -(-context_len // key_pool.shape[1])])
    keys = key_pool[pages].flatten(0, 1)[:context_len]
    values = value_pool[pages].flatten(0, 1)[:context_len]
    weights = (torch.einsum("hd,khd->hk", query, keys) * scale).softmax(dim=-1)
    return torch.einsum("hk,khd->hd", weights, values)


# %% divided_after_each_page_one
"""Task 3.2: acc is divided by the total after every page."""


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    block_size = key_pool.shape[1]
    partial = Partial.start(query)
    for page in range(-(-context_len // block_size)):
        filled = min(block_size, context_len - page * block_size)
        keys, values = key_pool[block_table[page], :filled], value_pool[block_table[page], :filled]
        partial = add_page(partial, torch.einsum("hd,khd->hk", query, keys) * scale, values)
        partial = partial._replace(acc=partial.acc / partial.total.unsqueeze(-1))
    return partial.acc


# %% double_result_one
"""Task 3.2: everything is computed in float64 and stays there."""


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    block_size = key_pool.shape[1]
    query = query.double()
    partial = Partial.start(query)
    for page in range(-(-context_len // block_size)):
        filled = min(block_size, context_len - page * block_size)
        keys, values = key_pool[block_table[page], :filled].double(), value_pool[block_table[page], :filled].double()
        partial = add_page(partial, torch.einsum("hd,khd->hk", query, keys) * scale, values)
    return partial.acc / partial.total.unsqueeze(-1)


# %% keys_by_page_values_gathered
"""Task 3.2: keys are read page by page, values are gathered."""


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    block_size = key_pool.shape[1]
    pages = list(block_table)[: -(-context_len // block_size)]
    scores = torch.cat([torch.einsum("hd,khd->hk", query, key_pool[page]) for page in pages], dim=-1) * scale
    weights = scores[:, :context_len].softmax(dim=-1)
    values = torch.cat([value_pool[page] for page in pages])[:context_len]
    return torch.einsum("hk,khd->hd", weights, values)


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


# %% masked_with_a_number_one
"""Task 3.2: hidden slots of the last page score minus ten thousand."""


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    block_size = key_pool.shape[1]
    partial = Partial.start(query)
    for page in range(-(-context_len // block_size)):
        scores = torch.einsum("hd,khd->hk", query, key_pool[block_table[page]]) * scale
        slots = page * block_size + torch.arange(block_size)
        partial = add_page(partial, scores.masked_fill(slots >= context_len, -1e4), value_pool[block_table[page]])
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


# %% page_by_bits_one
"""Task 3.2: blocks are taken to have a power of two of slots, and positions are shifted."""


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    shift = key_pool.shape[1].bit_length() - 1
    partial = Partial.start(query)
    for page in range(((context_len - 1) >> shift) + 1):
        filled = min(1 << shift, context_len - (page << shift))
        keys, values = key_pool[block_table[page], :filled], value_pool[block_table[page], :filled]
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


# %% pool_made_contiguous
"""Task 3.2: the pools are copied before they are read."""


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    key_pool, value_pool = key_pool.clone(), value_pool.clone()
    block_size = key_pool.shape[1]
    partial = Partial.start(query)
    for page in range(-(-context_len // block_size)):
        filled = min(block_size, context_len - page * block_size)
        keys, values = key_pool[block_table[page], :filled], value_pool[block_table[page], :filled]
        partial = add_page(partial, torch.einsum("hd,khd->hk", query, keys) * scale, values)
    return partial.acc / partial.total.unsqueeze(-1)


# %% scale_twice
"""Task 3.2: the scale is applied to the query and to the scores."""


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    block_size = key_pool.shape[1]
    partial, query = Partial.start(query), query * scale
    for page in range(-(-context_len // block_size)):
        filled = min(block_size, context_len - page * block_size)
        keys, values = key_pool[block_table[page], :filled], value_pool[block_table[page], :filled]
        partial = add_page(partial, torch.einsum("hd,khd->hk", query, keys) * scale, values)
    return partial.acc / partial.total.unsqueeze(-1)


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


# %% whole_pool_scored
"""Task 3.2: every block of the pool is scored, and the pages are picked from the scores."""


def attend_one(query, key_pool, value_pool, block_table, context_len, scale):
    block_size = key_pool.shape[1]
    everything = torch.einsum("hd,bkhd->bhk", query, key_pool) * scale
    partial = Partial.start(query)
    for page in range(-(-context_len // block_size)):
        filled = min(block_size, context_len - page * block_size)
        block_id = block_table[page]
        partial = add_page(partial, everything[block_id, :, :filled], value_pool[block_id, :filled])
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


# %% contexts_gathered_one_by_one
"""Task 3.3: each sequence's whole context is gathered, and one ordinary softmax does the rest."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    out = torch.empty_like(query)
    starts = query_starts.tolist()
    for seq, length in enumerate(context_lens.tolist()):
        pages = block_tables[seq, : -(-length // block_size)]
        keys, values = key_pool[pages].flatten(0, 1)[:length], value_pool[pages].flatten(0, 1)[:length]
        own = query[starts[seq] : starts[seq + 1]]
        scores = torch.einsum("nhd,khd->nhk", own, keys) * scale
        positions = torch.arange(length - len(own), length)
        scores = scores.masked_fill((torch.arange(length) > positions[:, None])[:, None], -math.inf)
        out[starts[seq] : starts[seq + 1]] = torch.einsum("nhk,khd->nhd", scores.softmax(-1), values)
    return out


# %% contexts_gathered_together
"""Task 3.3: all lanes' pages are gathered at once, padded, and one ordinary softmax does the rest."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    rows = torch.arange(len(query))
    seqs = torch.bucketize(rows, query_starts[1:], right=True)
    lens = context_lens[seqs] - query_starts[seqs + 1] + rows + 1
    keys, values = key_pool[block_tables[seqs]].flatten(1, 2), value_pool[block_tables[seqs]].flatten(1, 2)
    scores = torch.einsum("nhd,nkhd->nhk", query, keys) * scale
    scores = scores.masked_fill((torch.arange(keys.shape[1]) >= lens[:, None])[:, None], -math.inf)
    return torch.einsum("nhk,nkhd->nhd", scores.softmax(-1), values)


# %% divided_after_each_page_all
"""Task 3.3: acc is divided by the total after each page."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    rows = torch.arange(len(query))
    seqs = torch.bucketize(rows, query_starts[1:], right=True)
    lens = context_lens[seqs] - query_starts[seqs + 1] + rows + 1
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seqs, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
        partial = partial._replace(acc=partial.acc / partial.total.unsqueeze(-1))
    return partial.acc


# %% double_result_all
"""Task 3.3: everything is computed in float64, and the result stays float64."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    query = query.double()
    rows = torch.arange(len(query))
    seqs = torch.bucketize(rows, query_starts[1:], right=True)
    lens = context_lens[seqs] - query_starts[seqs + 1] + rows + 1
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seqs, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids].double()) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids].double())
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


# %% heads_reversed_in_later_values
"""Task 3.3: heads are mixed up: from the third page on, the heads of the values are reversed."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    rows = torch.arange(len(query))
    seqs = torch.bucketize(rows, query_starts[1:], right=True)
    lens = context_lens[seqs] - query_starts[seqs + 1] + rows + 1
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seqs, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids].flip(2) if page > 1 else value_pool[block_ids])
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


# %% mask_kept_by_identity
"""Task 3.3: the plan is kept for as long as the same tensor of lengths is given, though its numbers may change."""

_PLAN: list = []


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    if not _PLAN or _PLAN[0] is not context_lens or _PLAN[1] is not query_starts:
        rows = torch.arange(len(query))
        seqs = torch.bucketize(rows, query_starts[1:], right=True)
        _PLAN[:] = [context_lens, query_starts, seqs, context_lens[seqs] - query_starts[seqs + 1] + rows + 1]
    _, _, seqs, lens = _PLAN
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seqs, page]
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


# %% masked_with_a_number
"""Task 3.3: hidden slots score minus ten thousand."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    rows = torch.arange(len(query))
    seqs = torch.bucketize(rows, query_starts[1:], right=True)
    lens = context_lens[seqs] - query_starts[seqs + 1] + rows + 1
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seqs, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -1e4)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)


# %% maximum_before_the_mask
"""Task 3.3: a page's maximum is taken over all of its slots, hidden ones too."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    rows = torch.arange(len(query))
    seqs = torch.bucketize(rows, query_starts[1:], right=True)
    lens = context_lens[seqs] - query_starts[seqs + 1] + rows + 1
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seqs, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        maximum = torch.maximum(partial.maximum, scores.amax(-1))
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        weights, shrink = (scores - maximum[..., None]).exp(), (partial.maximum - maximum).exp()
        acc = partial.acc * shrink[..., None] + torch.einsum("nhk,nkhd->nhd", weights, value_pool[block_ids])
        partial = Partial(maximum, partial.total * shrink + weights.sum(-1), acc)
    return partial.acc / partial.total.unsqueeze(-1)


# %% no_rows_forgotten
"""Task 3.3: a sequence without rows breaks the numbering of the lanes."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    marks = torch.zeros(len(query), dtype=torch.int64)
    marks[query_starts[1:-1]] = 1
    seqs = marks.cumsum(0)
    lens = context_lens[seqs] - query_starts[seqs + 1] + torch.arange(len(query)) + 1
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seqs, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)


# %% one_page_past_the_table
"""Task 3.3: a context that fills its pages is followed one page further, past the end of the table."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    rows = torch.arange(len(query))
    seqs = torch.bucketize(rows, query_starts[1:], right=True)
    lens = context_lens[seqs] - query_starts[seqs + 1] + rows + 1
    partial = Partial.start(query)
    for page in range(int(lens.max()) // block_size + 1):
        block_ids = block_tables[seqs, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)


# %% page_by_bits_all
"""Task 3.3: the number of pages is shifted by the logarithm of the block size."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    shift = block_size.bit_length() - 1
    rows = torch.arange(len(query))
    seqs = torch.bucketize(rows, query_starts[1:], right=True)
    lens = context_lens[seqs] - query_starts[seqs + 1] + rows + 1
    partial = Partial.start(query)
    for page in range(((int(lens.max()) - 1) >> shift) + 1):
        block_ids = block_tables[seqs, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = (page << shift) + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)


# %% pages_kept_in_a_list
"""Task 3.3: the pages of all steps are picked first and held in two lists."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    rows = torch.arange(len(query))
    seqs = torch.bucketize(rows, query_starts[1:], right=True)
    lens = context_lens[seqs] - query_starts[seqs + 1] + rows + 1
    steps = range(-(-int(lens.max()) // block_size))
    all_keys = [key_pool[block_tables[seqs, page]] for page in steps]
    all_values = [value_pool[block_tables[seqs, page]] for page in steps]
    partial = Partial.start(query)
    for page in steps:
        scores = torch.einsum("nhd,nkhd->nhk", query, all_keys[page]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, all_values[page])
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


# %% plan_kept_by_rows
"""Task 3.3: which sequence and length each lane has is worked out once for a number of rows, and kept."""

_PLANS: dict = {}


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    block_size = key_pool.shape[1]
    key = tuple(query_starts.tolist())
    if key not in _PLANS:
        rows = torch.arange(len(query))
        seqs = torch.bucketize(rows, query_starts[1:], right=True)
        _PLANS[key] = seqs, context_lens[seqs] - query_starts[seqs + 1] + rows + 1
    seqs, lens = _PLANS[key]
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        block_ids = block_tables[seqs, page]
        scores = torch.einsum("nhd,nkhd->nhk", query, key_pool[block_ids]) * scale
        positions = page * block_size + torch.arange(block_size)
        scores = scores.masked_fill((positions >= lens[:, None])[:, None], -math.inf)
        partial = add_page(partial, scores, value_pool[block_ids])
    return partial.acc / partial.total.unsqueeze(-1)


# %% row_by_row
"""Task 3.3: one row after the other, each on its own."""


def paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale):
    out, starts, tables = [], query_starts.tolist(), block_tables.tolist()
    for seq, length in enumerate(context_lens.tolist()):
        for row in range(starts[seq], starts[seq + 1]):
            lens = length - (starts[seq + 1] - 1 - row)
            out.append(attend_one(query[row], key_pool, value_pool, tables[seq], lens, scale))
    return torch.stack(out)


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


# %% operations_of_the_whole_step
"""Task 3.4: the operations of a whole context of 60 pages are given, not those of one page."""


def answer_3_4() -> tuple[float, str]:
    return 3688.0, "Every page starts dozens of small operations from Python, and a kernel would run the loop inside one."


# %% operations_per_token
"""Task 3.4: the operations of a page are divided by its tokens."""


def answer_3_4() -> tuple[float, str]:
    return 61 / 16, "Every page starts dozens of small operations from Python, and a kernel would run the loop inside one."


# %% without_a_reason
"""Task 3.4: the number is right, and the text says nothing."""


def answer_3_4() -> tuple[float, str]:
    return 61.0, "because of Python"


# %% add_page_shared_total
"""Task 3.1: a page is left out for all queries if the first query does not see its first slot."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    if not torch.isfinite(scores.reshape(-1)[0]):
        return partial
    maximum = torch.maximum(partial.maximum, scores.amax(-1))
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * shrink + weights.sum(-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hs,...shd->...hd", weights, values)
    return Partial(maximum, total, acc)


# %% paged_context_lens_max
"""Task 3.3: the number of pages comes from the largest context length, also that of a sequence without rows."""


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    block_size = key_pool.shape[1]
    counts = query_starts[1:] - query_starts[:-1]
    owner = torch.repeat_interleave(torch.arange(len(counts), device=query.device), counts)
    rows = torch.arange(len(query), device=query.device)
    seen = context_lens[owner] - (query_starts[owner + 1] - rows) + 1
    offsets = torch.arange(block_size, device=query.device)
    partial = Partial.start(query)
    for page in range(-(-int(context_lens.max()) // block_size)):
        blocks = block_tables[owner, page]
        scores = torch.einsum("qhd,qshd->qhs", query, key_pool[blocks]) * scale
        hidden = page * block_size + offsets >= seen[:, None]
        partial = add_page(partial, scores.masked_fill(hidden[:, None], -math.inf), value_pool[blocks])
    return partial.acc / partial.total.unsqueeze(-1)


# %% divided_by_a_page_too_many
"""Task 3.4: the difference of contexts of 4 and 24 pages is divided by 21."""


def answer_3_4() -> tuple[float, str]:
    return (
        61 * 20 / 21,
        "Every page starts dozens of small operations from Python; a kernel runs the loop inside one.",
    )
