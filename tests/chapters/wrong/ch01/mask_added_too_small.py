"""Task 1.2: a large negative number is added to hidden scores, which is too small if a slot holds something larger."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    hidden = torch.arange(keys.shape[1]) > positions.unsqueeze(-1)
    scores = scores + hidden.unsqueeze(1) * -1000.0
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values)
