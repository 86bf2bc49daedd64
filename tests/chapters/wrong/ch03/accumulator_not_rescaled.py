"""Task 3.1: a new maximum shrinks the total but not the accumulator."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.max(dim=-1).values)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total * torch.exp(partial.maximum - maximum) + weights.sum(dim=-1)
    acc = partial.acc + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)
