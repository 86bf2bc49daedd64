"""Wrong solutions of chapter 00. ``# %%`` names each, its docstring the task and the mistake."""

# %% exp_overflows
"""Task 0.1: probabilities are computed without subtracting the maximum, so that large scores become infinite."""


def greedy_token(logits: Tensor) -> int:
    weights = torch.exp(logits)
    return int(torch.argmax(weights / weights.sum()))


# %% last_of_equals
"""Task 0.1: of equal scores the last one wins."""


def greedy_token(logits: Tensor) -> int:
    best = 0
    for token_id, score in enumerate(logits.tolist()):
        if score >= logits[best]:
            best = token_id
    return best


# %% last_token_left_out
"""Task 0.1: the vocabulary's last token is never looked at."""


def greedy_token(logits: Tensor) -> int:
    best = 0
    for token_id in range(1, len(logits) - 1):
        if logits[token_id] > logits[best]:
            best = token_id
    return best


# %% negative_scores
"""Task 0.1: the search for the maximum starts at zero, so that token 0 wins when all scores are negative."""


def greedy_token(logits: Tensor) -> int:
    best, best_score = 0, 0.0
    for token_id, score in enumerate(logits.tolist()):
        if score > best_score:
            best, best_score = token_id, score
    return best


# %% rounded_scores
"""Task 0.1: the scores are rounded to half precision first, so that close ones become equal."""


def greedy_token(logits: Tensor) -> int:
    return int(logits.half().argmax())


# %% tensor_returned
"""Task 0.1: a tensor of one element is returned, no int."""


def greedy_token(logits: Tensor) -> int:
    return logits.argmax()


# %% all_positions_reported
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


# %% caller_prompt_grows
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


# %% end_in_prompt
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


# %% end_left_out
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


# %% end_of_another_model
"""Task 0.2: the end-of-sequence token is always GPT-2's, and the model's configuration is not read."""

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


# %% last_logits_unreported
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


# %% probabilities_reported
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
