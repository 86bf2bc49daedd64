"""Task 0.2: the model is called without compute_logits, and tokens are made by a generator; numpy finds the maximum."""


def greedy_token(logits: Tensor) -> int:
    return logits.numpy().argmax().item()


def tokens_of(model, text, on_logits):
    with torch.inference_mode():
        while True:
            scores = model(input_ids=torch.as_tensor(text, device=model.device).unsqueeze(0), use_cache=False).logits[
                0, -1, :
            ]
            on_logits(scores)
            text = [*text, greedy_token(scores)]
            yield text[-1]


def generate_one(
    model: GPT2LMHeadModel, prompt: Sequence[int], max_new_tokens: int, on_logits: Callable[[Tensor], None]
) -> list[int]:
    answer = []
    for _, token_id in zip(range(max_new_tokens), tokens_of(model, [*prompt], on_logits)):
        answer.append(token_id)
        if token_id == model.config.eos_token_id:
            break
    return answer


def answer_0_3() -> tuple[float, str]:
    return 1776 / 752, "The texts are longer in the second half, and every token computes all of its text once more."
