"""Task 3.1: a new maximum shrinks the accumulator but not the total."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    total = partial.total + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)
