"""Task 1.2: every new token sees as far as the newest one of its sequence."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    lengths = positions.amax(dim=1) + 1
    hidden = torch.arange(keys.shape[1]) >= lengths[:, None]
    scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values)
