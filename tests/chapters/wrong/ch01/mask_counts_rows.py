"""Task 1.2: the rows of a prefill are numbered from zero, so that new tokens after cached ones see too little."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    num_new, max_len = query.shape[1], keys.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    if num_new > 1:
        visible = torch.ones(num_new, max_len, dtype=torch.bool).tril()
    else:
        visible = (torch.arange(max_len) <= positions[:, :1])[:, None, None]
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)
