"""Task 0.1: the scores are rounded to half precision first, so that close ones become equal."""


def greedy_token(logits: Tensor) -> int:
    return int(logits.half().argmax())
