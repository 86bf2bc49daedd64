"""Task 0.2: an end-of-sequence token in the prompt ends the answer too."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = compute_logits(model, token_ids)[-1]
        on_logits(logits)
        token_ids.append(greedy_token(logits))
        if model.config.eos_token_id in token_ids:
            break
    return token_ids[len(prompt) :]
