"""Task 1.2: the scores are divided by the root of head_dim, whatever scale the caller gives."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) / math.sqrt(query.shape[-1])
    hidden = torch.arange(keys.shape[1]) > positions.unsqueeze(-1)
    scores = scores.masked_fill(hidden.unsqueeze(1), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values)
