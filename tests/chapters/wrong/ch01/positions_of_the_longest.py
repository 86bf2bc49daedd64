"""Task 1.3: all texts stand at the position of the longest, as if the padding were part of them."""


def decode_inputs(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(text) for text in texts)
    token_ids = torch.tensor([[text[-1]] for text in texts])
    positions = torch.full((len(texts), 1), longest - 1)
    return token_ids, positions, torch.arange(len(texts))
