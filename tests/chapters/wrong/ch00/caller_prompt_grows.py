"""Task 0.2: new tokens are appended to the caller's own prompt."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids = prompt
    num_prompt_tokens = len(prompt)
    while len(token_ids) < num_prompt_tokens + max_new_tokens:
        logits = compute_logits(model, token_ids)[-1]
        on_logits(logits)
        token_ids.append(greedy_token(logits))
        if token_ids[-1] == model.config.eos_token_id:
            break
    return token_ids[num_prompt_tokens:]
