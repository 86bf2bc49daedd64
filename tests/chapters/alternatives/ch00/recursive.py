"""Task 0.2: one token, then the rest by recursion; the first of equal scores by a stable sort."""


def greedy_token(logits: Tensor) -> int:
    order = torch.sort(logits, descending=True, stable=True).indices
    return order[0].item()


def generate_one(
    model: GPT2LMHeadModel, prompt: Sequence[int], max_new_tokens: int, on_logits: Callable[[Tensor], None]
) -> list[int]:
    if max_new_tokens == 0:
        return []
    logits = compute_logits(model, tuple(prompt))[len(prompt) - 1]
    on_logits(logits)
    token_id = greedy_token(logits)
    if token_id == model.config.eos_token_id:
        return [token_id]
    return [token_id, *generate_one(model, [*prompt, token_id], max_new_tokens - 1, on_logits)]
