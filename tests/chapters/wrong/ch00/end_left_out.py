"""Task 0.2: the end-of-sequence token is not part of the answer."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    answer = []
    for _ in range(max_new_tokens):
        logits = compute_logits(model, [*prompt, *answer])[-1]
        on_logits(logits)
        token_id = greedy_token(logits)
        if token_id == model.config.eos_token_id:
            break
        answer.append(token_id)
    return answer
