"""Chapter 00: greedy generation that recomputes everything.

A language model is a function from tokens to scores: give it ``n`` token ids, and for each of the ``n`` positions it says
how likely every token of the vocabulary is to come next. Generating is calling it in a loop. This is that loop and nothing
else: each new token costs a forward pass over the whole text so far, so for the thousandth token a thousand rows are
computed, of which one is new.

What changes from the chapter before: nothing, this is the first.

Tasks (10 points, about 1 hour):

- 0.1 (4 points) ``greedy_token``: the token that greedy decoding takes.
- 0.2 (6 points) ``generate_one``: the loop.

Know first: what a forward pass of a transformer returns, and how to index a torch tensor.
In the engine: :mod:`pagebrain.sampling` chooses tokens, :meth:`pagebrain.engine.engine.Engine.step` is the loop. In vLLM:
``vllm/v1/sample/sampler.py`` and ``LLMEngine.step``.
From pagebrain: nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

OnLogits = Callable[[int, Tensor], None]
"""Called for each new token with the prompt's index and the logits ``[vocab_size]`` that it was chosen from."""


def check_prompts(model: GPT2LMHeadModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ``ValueError`` for what no chapter could serve: nothing to start from, unknown tokens, or too few positions."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    vocab_size, num_positions = model.config.vocab_size, model.config.n_positions
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: give at least one token")
        if not all(0 <= token_id < vocab_size for token_id in prompt):
            raise ValueError(f"prompt {index} holds token ids outside 0..{vocab_size - 1}: {list(prompt)}")
        if len(prompt) + max_new_tokens > num_positions:
            raise ValueError(
                f"prompt {index} of {len(prompt)} tokens and {max_new_tokens} new ones need {len(prompt) + max_new_tokens} "
                f"positions, but the model has {num_positions}: shorten it or generate less"
            )


@torch.no_grad()
def compute_logits(model: GPT2LMHeadModel, token_ids: Sequence[int]) -> Tensor:
    """One forward pass over a text, without any cache. Returns the scores ``[num_tokens, vocab_size]``.

    Row ``i`` scores what may follow token ``i``: it has seen tokens ``0 .. i`` and no others.
    """
    batch = torch.tensor([list(token_ids)], device=model.device)  # [1, num_tokens]
    logits: Tensor = model(batch, use_cache=False).logits[0]
    return logits


def greedy_token(logits: Tensor) -> int:
    """Task 0.1: the token with the highest score. ``logits`` is ``[vocab_size]``; of equal scores the first one wins."""
    # BEGIN SOLUTION 0.1
    return int(logits.argmax())
    # END SOLUTION


def generate_one(
    model: GPT2LMHeadModel, prompt: Sequence[int], max_new_tokens: int, on_logits: Callable[[Tensor], None]
) -> list[int]:
    """Task 0.2: the greedy continuation of one prompt.

    For each new token: compute the logits of the whole text so far, hand those of the last position to ``on_logits``, take
    the greedy token. Stop after ``max_new_tokens``, or earlier with the model's end-of-sequence token, which is part of the
    answer. The prompt is not, and it stays as it was given.
    """
    # BEGIN SOLUTION 0.2
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + max_new_tokens:
        logits = compute_logits(model, token_ids)[-1]
        on_logits(logits)
        token_ids.append(greedy_token(logits))
        if token_ids[-1] == model.config.eos_token_id:
            break
    return token_ids[len(prompt) :]
    # END SOLUTION


def generate(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_logits: OnLogits | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, one prompt after the other. Every chapter has this function."""
    check_prompts(model, prompts, max_new_tokens)
    answers = []
    for index, prompt in enumerate(prompts):

        def report(logits: Tensor, index: int = index) -> None:
            if on_logits is not None:
                on_logits(index, logits)

        answers.append(generate_one(model, prompt, max_new_tokens, report))
    return answers
