"""Task 0.2: the logits that the end-of-sequence token was chosen from are not reported."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    answer = []
    while len(answer) < max_new_tokens:
        logits = compute_logits(model, [*prompt, *answer])[-1]
        answer.append(greedy_token(logits))
        if answer[-1] == model.config.eos_token_id:
            return answer
        on_logits(logits)
    return answer
