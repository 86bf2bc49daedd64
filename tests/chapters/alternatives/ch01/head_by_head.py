"""Task 1.2: one head after the other by matrix products, a softmax by hand, and a scatter within each sequence's row."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        index = positions[..., None, None].expand_as(key)
        self.keys[layer].scatter_(1, index, key)
        self.values[layer].scatter_(1, index, value)


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    length = int(positions.max()) + 1  # slots behind the last query are not needed
    visible = torch.arange(length, device=keys.device).lt(positions.unsqueeze(-1) + 1)
    heads = []
    for head in range(query.shape[2]):
        scores = scale * query[:, :, head] @ keys[:, :length, head].mT
        scores = torch.where(visible, scores, torch.finfo(scores.dtype).min)
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * visible
        heads.append(weights @ values[:, :length, head] / weights.sum(-1, keepdim=True))
    return torch.stack(heads, dim=2)


def decode_inputs(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    pairs = torch.tensor([(text[len(text) - 1], len(text) - 1) for text in texts], dtype=torch.long)
    token_ids, positions = pairs.hsplit(2)
    return token_ids, positions, torch.arange(0, len(texts))


def answer_1_4() -> tuple[float, str]:
    return 17.1, "Two thirds are never written while the run lasts, and about a sixth belongs to stories that are over."
