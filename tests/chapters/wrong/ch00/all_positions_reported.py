"""Task 0.2: the logits of all positions are reported, not only those of the last."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    answer = []
    for _ in range(max_new_tokens):
        logits = compute_logits(model, [*prompt, *answer])
        on_logits(logits)
        answer.append(greedy_token(logits[-1]))
        if answer[-1] == model.config.eos_token_id:
            break
    return answer
