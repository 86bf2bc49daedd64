"""Task 0.2: the end-of-sequence token is GPT-2's, whatever the model's configuration says."""

END_OF_TEXT = 50256


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = compute_logits(model, token_ids)[-1]
        on_logits(logits)
        token_ids.append(greedy_token(logits))
        if token_ids[-1] == END_OF_TEXT:
            break
    return token_ids[len(prompt) :]
