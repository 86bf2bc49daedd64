"""Task 0.1: probabilities are computed without subtracting the maximum, so that large scores become infinite."""


def greedy_token(logits: Tensor) -> int:
    weights = torch.exp(logits)
    return int(torch.argmax(weights / weights.sum()))
