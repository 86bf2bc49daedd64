"""Task 0.2: a for loop whose else branch is the answer of full length; the maximum is found with Python's max."""


def greedy_token(logits: Tensor) -> int:
    scores = logits.tolist()
    return scores.index(max(scores))


def generate_one(
    model: GPT2LMHeadModel, prompt: Sequence[int], max_new_tokens: int, on_logits: Callable[[Tensor], None]
) -> list[int]:
    answer: list[int] = []
    for _ in range(max_new_tokens):
        *_, logits = compute_logits(model, [*prompt, *answer])
        on_logits(logits)
        answer.append(greedy_token(logits))
        if answer[-1] == model.config.eos_token_id:
            break
    else:
        assert len(answer) == max_new_tokens
    return answer
