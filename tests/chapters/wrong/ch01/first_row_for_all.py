"""Task 1.3: every text's last row is row 0."""


def decode_inputs(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    token_ids = torch.tensor([text[-1] for text in texts]).unsqueeze(1)
    positions = torch.tensor([len(text) - 1 for text in texts]).unsqueeze(1)
    return token_ids, positions, torch.zeros(len(texts), dtype=torch.int64)
