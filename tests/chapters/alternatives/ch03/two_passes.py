"""Task 3.3: one pass over the pages for each query's largest score, a second for the sums; no rescaling."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    # The logarithms of the totals are added; exp of their difference to the new maximum is the new total.
    largest = scores.amax(dim=-1)
    maximum = torch.where(largest > partial.maximum, largest, partial.maximum)
    old_sum = partial.maximum + partial.total.log()
    log_sum = torch.logaddexp(old_sum, scores.logsumexp(dim=-1))
    weights = (scores - maximum[..., None]).exp().transpose(-1, -2)  # [..., block_size, num_heads]
    acc = partial.acc * (partial.maximum - maximum).exp()[..., None] + (weights[..., None] * values).sum(dim=-3)
    return Partial(maximum, (log_sum - maximum).exp(), acc)


def attend_one(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Sequence[int], context_len: int, scale: float
) -> Tensor:
    block_size = key_pool.shape[1]
    pages = [
        (block_table[start // block_size], min(block_size, context_len - start))
        for start in range(0, context_len, block_size)
    ]
    scores = [scale * (key_pool[block_id, :filled] * query).sum(dim=-1) for block_id, filled in pages]  # [filled, num_heads]
    largest = torch.stack([page.amax(dim=0) for page in scores]).amax(dim=0)
    total, acc = torch.zeros_like(largest), torch.zeros_like(query)
    for (block_id, filled), page in zip(pages, scores, strict=True):
        weights = torch.exp(page - largest)
        total = total + weights.sum(dim=0)
        acc = acc + torch.einsum("kh,khd->hd", weights, value_pool[block_id, :filled])
    return acc / total[:, None]


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
    rows = torch.arange(len(query), device=query.device)
    seq_of_lane = torch.bucketize(rows, query_starts[1:], right=True)
    lens = context_lens[seq_of_lane] - query_starts[seq_of_lane + 1] + rows + 1
    num_pages = -(-int(lens.max()) // block_size)
    offsets = torch.arange(block_size, device=query.device)
    pages = []
    for page in range(num_pages):
        keys = key_pool[block_tables[seq_of_lane, page]]
        visible = page * block_size + offsets < lens[:, None]  # [num_tokens, block_size]
        pages.append(torch.where(visible[:, None], torch.einsum("nhd,nkhd->nhk", query, keys) * scale, -math.inf))
    largest = torch.stack(pages).amax(dim=(0, -1))
    total, acc = torch.zeros_like(largest), torch.zeros_like(query)
    for page, scores in enumerate(pages):
        weights = torch.exp(scores - largest[..., None])
        total += weights.sum(dim=-1)
        acc += torch.einsum("nhk,nkhd->nhd", weights, value_pool[block_tables[seq_of_lane, page]])
    return acc / total[..., None]


def answer_3_4() -> tuple[float, str]:
    return (
        41,
        "Each page starts its own small operations, and starting them costs more than their arithmetic. A kernel is one.",
    )
