"""Task 0.2: probabilities are reported in place of logits."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids = list(prompt)
    for _ in range(max_new_tokens):
        scores = compute_logits(model, token_ids)[-1].softmax(dim=-1)
        on_logits(scores)
        token_ids.append(greedy_token(scores))
        if token_ids[-1] == model.config.eos_token_id:
            break
    return token_ids[len(prompt) :]
