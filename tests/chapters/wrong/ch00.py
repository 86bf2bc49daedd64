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


# %% probabilities_first
"""Task 0.1: the scores are made probabilities first, in which a lead of less than a rounding is lost."""


def greedy_token(logits: Tensor) -> int:
    return int(logits.softmax(dim=-1).argmax())


# %% remembered_by_address
"""Task 0.1: the answer is kept by the tensor's identity, and given again when the numbers in it have changed."""

ANSWERS = {}


def greedy_token(logits: Tensor) -> int:
    if id(logits) not in ANSWERS:
        ANSWERS[id(logits)] = (logits, int(logits.argmax()))
    return ANSWERS[id(logits)][1]


# %% topk_of_ties
"""Task 0.1: topk promises no order among equal scores."""


def greedy_token(logits: Tensor) -> int:
    return int(logits.topk(1).indices)


# %% nearly_equal_scores
"""Task 0.1: scores within a tolerance of the highest count as equal to it."""


def greedy_token(logits: Tensor) -> int:
    return int(torch.isclose(logits, logits.max()).nonzero()[0])


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


# %% generated_by_hugging_face
"""Task 0.2: Hugging Face's own generate makes the answer, and one forward pass over all of it makes the logits."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    given = torch.tensor([list(prompt)], device=model.device)
    text = model.generate(
        given, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=model.config.eos_token_id, pad_token_id=0
    )[0].tolist()
    for logits in compute_logits(model, text)[len(prompt) - 1 : -1]:
        on_logits(logits)
    return text[len(prompt) :]


# %% kept_by_hugging_faces_cache
"""Task 0.2: Hugging Face's cache keeps the keys and values, which is the next chapter's subject."""


@torch.no_grad()
def generate_one(model, prompt, max_new_tokens, on_logits):
    answer, cache, new = [], None, list(prompt)
    while len(answer) < max_new_tokens:
        out = model(torch.tensor([new], device=model.device), past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        on_logits(logits)
        new = [greedy_token(logits)]
        answer += new
        if new[0] == model.config.eos_token_id:
            break
    return answer


# %% computed_twice
"""Task 0.2: the text is computed once for on_logits and once more for the token."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids = list(prompt)
    for _ in range(max_new_tokens):
        on_logits(compute_logits(model, token_ids)[-1])
        token_ids.append(greedy_token(compute_logits(model, token_ids)[-1]))
        if token_ids[-1] == model.config.eos_token_id:
            break
    return token_ids[len(prompt) :]


# %% one_forward_too_many
"""Task 0.2: the logits after the last token are computed too, and never used."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids = list(prompt)
    logits = compute_logits(model, token_ids)[-1]
    for _ in range(max_new_tokens):
        on_logits(logits)
        token_ids.append(greedy_token(logits))
        if token_ids[-1] == model.config.eos_token_id:
            break
        if len(token_ids) < model.config.n_positions:
            logits = compute_logits(model, token_ids)[-1]
    return token_ids[len(prompt) :]


# %% reported_at_the_end
"""Task 0.2: the logits are collected and all handed over when the answer is complete."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids, scores = list(prompt), []
    for _ in range(max_new_tokens):
        scores.append(compute_logits(model, token_ids)[-1])
        token_ids.append(greedy_token(scores[-1]))
        if token_ids[-1] == model.config.eos_token_id:
            break
    for logits in scores:
        on_logits(logits)
    return token_ids[len(prompt) :]


# %% end_token_zero
"""Task 0.2: an end-of-sequence token 0 counts as none."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids, end = list(prompt), model.config.eos_token_id
    for _ in range(max_new_tokens):
        logits = compute_logits(model, token_ids)[-1]
        on_logits(logits)
        token_ids.append(greedy_token(logits))
        if end and token_ids[-1] == end:
            break
    return token_ids[len(prompt) :]


# %% prompts_are_lists
"""Task 0.2: a prompt that is a tuple cannot be added to a list."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    answer = []
    for _ in range(max_new_tokens):
        logits = compute_logits(model, prompt + answer)[-1]
        on_logits(logits)
        answer.append(greedy_token(logits))
        if answer[-1] == model.config.eos_token_id:
            break
    return answer


# %% last_positions_only
"""Task 0.2: the model is shown the last 1024 tokens of the text, whatever the model's own limit."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = compute_logits(model, token_ids[-1024:])[-1]
        on_logits(logits)
        token_ids.append(greedy_token(logits))
        if token_ids[-1] == model.config.eos_token_id:
            break
    return token_ids[len(prompt) :]


# %% texts_remembered
"""Task 0.2: the logits of a text are remembered, and given for the same text of another model."""

SEEN = {}


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids = list(prompt)
    for _ in range(max_new_tokens):
        if tuple(token_ids) not in SEEN:
            SEEN[tuple(token_ids)] = compute_logits(model, token_ids)[-1]
        logits = SEEN[tuple(token_ids)]
        on_logits(logits)
        token_ids.append(greedy_token(logits))
        if token_ids[-1] == model.config.eos_token_id:
            break
    return token_ids[len(prompt) :]


# %% end_of_generation_config
"""Task 0.2: the end-of-sequence token is read from the model's generation_config, and not from its config."""


def generate_one(model, prompt, max_new_tokens, on_logits):
    token_ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = compute_logits(model, token_ids)[-1]
        on_logits(logits)
        token_ids.append(greedy_token(logits))
        if token_ids[-1] == model.generation_config.eos_token_id:
            break
    return token_ids[len(prompt) :]


# %% rows_of_the_limit
"""Task 0.3: the number is that of a very long answer, and was not measured for 64 tokens."""


def answer_0_3() -> tuple[float, str]:
    return 3.0, "The cost of an answer grows with the square of its length, so the second half costs three quarters."


# %% passes_counted
"""Task 0.3: forward passes are counted, and not the rows that they compute."""


def answer_0_3() -> tuple[float, str]:
    return 1.0, "Each half of the answer has 32 tokens, and each token costs one forward pass, so they cost the same."


# %% nothing_explained
"""Task 0.3: the number comes without a reason."""


def answer_0_3() -> tuple[float, str]:
    return 2.36, "I measured it."


# %% middles_of_the_halves
"""Task 0.3: the number is estimated from the middle length of each half, counted from 8 and from 41, and not measured."""


def answer_0_3() -> tuple[float, str]:
    return 57 / 24, "A text in the middle of the second half has 57 tokens, and one in the middle of the first half has 24."
