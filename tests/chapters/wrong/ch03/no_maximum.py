"""Task 3.1: nothing is subtracted before the exponential; the maximum is only noted."""


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    weights = torch.exp(scores)
    total = partial.total + weights.sum(dim=-1)
    acc = partial.acc + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)
