"""Chapter 00: the token that greedy decoding takes, and the loop, compared with vanilla Hugging Face GPT-2."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from tests.support.answers import assert_answer
from tests.support.departures import assert_same, assert_same_tokens
from tests.support.hints import hint
from tests.support.models import hf_greedy, hf_logits, random_gpt2

CHAPTER = "00"


def varied_gpt2(seed: int) -> GPT2LMHeadModel:
    """A random model whose answers vary: scores that are not tied to the embeddings do not repeat the last token."""
    return random_gpt2(seed=seed, tie_word_embeddings=False)


def without_end(seed: int) -> GPT2LMHeadModel:
    base = varied_gpt2(seed)
    base.config.eos_token_id = None
    return base


def ending_at(place: int, prompt: list[int], seed: int) -> GPT2LMHeadModel:
    """A model whose end-of-sequence token is output token ``place`` of its answer to ``prompt``, and none before it."""
    for attempt in range(100):
        base = without_end(1000 * seed + attempt)
        answer = hf_greedy(base, prompt, place + 1)
        if answer[place] not in answer[:place]:
            base.config.eos_token_id = answer[place]
            return base
    raise AssertionError(f"no model found that could end at output token {place}: try another --seed")


def take(chapter: Any, scores: Tensor) -> int:
    """What ``greedy_token`` takes; it must be a Python int, and leave the scores as they were."""
    given = scores.clone()
    token = chapter.greedy_token(given)
    assert type(token) is int, f"greedy_token returned {token!r} of type {type(token).__name__}, expected a Python int"
    assert torch.equal(given, scores), "greedy_token changed the scores that it was given"
    return token


@pytest.mark.task(
    "0.1",
    hint="Return the index of the highest score as a Python int. All scores may be far below zero, and none may be changed.",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_highest_score_wins_wherever_it_stands(chapter: Any, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    for best in range(13):
        for level in (2.0, 0.0, -3.0, -1e20):  # scores may all be below zero, by any amount
            scores = (-torch.rand(13, generator=generator, dtype=torch.float64) - 0.5 + level).to(dtype)
            scores[(best + 1) % 13] = -torch.inf
            scores[best] = level if level > -1e19 else -1e19
            got = take(chapter, scores)
            shown = ", ".join(f"{score:.3g}" for score in scores.tolist())
            assert got == best, f"greedy_token took token {got}, but token {best} has the highest score of [{shown}]"


@pytest.mark.task(
    "0.1", hint="If scores are equal, the lowest token id wins. Sorting and topk may order equal scores in any way."
)
@pytest.mark.parametrize("vocab_size", [*range(1, 41), 97, 3000, 10000])
def test_of_equal_scores_the_first_wins(chapter: Any, seed: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(vocab_size, dtype=torch.float64)
    got = take(chapter, scores)
    assert got == 0, f"all {vocab_size} scores are equal: the first one wins, which is token 0, but greedy_token took {got}"
    for _ in range(5 if vocab_size < 5000 else 1):
        tied = sorted(torch.randperm(vocab_size, generator=generator)[: max(2, min(vocab_size // 10, 500))].tolist())
        scores = -torch.rand(vocab_size, generator=generator, dtype=torch.float64) - 0.1
        scores[tied] = -0.05
        got = take(chapter, scores)
        assert got == tied[0], f"tokens {tied[:5]} share the highest score: the first is {tied[0]}, greedy_token took {got}"


@pytest.mark.task(
    "0.1",
    hint="Compare the scores as they are: do not round them, convert them to another dtype, or make probabilities of them.",
)
def test_a_small_lead_is_enough(chapter: Any) -> None:
    for level, lead in ((3.0, 1e-10), (0.0, 1e-30)):
        for best in range(9):
            scores = torch.full((9,), level, dtype=torch.float64)
            scores[best] += lead
            got = take(chapter, scores)
            others = (
                f"the other scores are {level:g}, that of token {best} is higher by {lead:g} (float64 can represent both)"
            )
            assert got == best, f"{others}, but greedy_token took {got}"


@pytest.mark.task("0.1", hint="The answer depends on the scores as they are now. Keep nothing from an earlier call.")
def test_the_same_tensor_with_other_scores_gives_another_token(chapter: Any) -> None:
    scores = torch.zeros(7, dtype=torch.float64)
    for best in (3, 5, 0):
        scores.zero_()
        scores[best] = 1.0
        got = chapter.greedy_token(scores)
        assert got == best, f"the tensor was changed so that token {best} has the highest score, but greedy_token took {got}"


def assert_continues(
    run: Callable[[list[int], Callable[[Tensor], None]], Any], base: GPT2LMHeadModel, prompt: list[int], count: int
) -> None:
    """One answer, and the logits that it was chosen from, against Hugging Face."""
    given = list(prompt)
    scores: list[Tensor] = []
    answer = run(given, lambda logits: scores.append(torch.as_tensor(logits).clone()))
    name = f"the answer to a prompt of {len(prompt)} tokens"
    assert isinstance(answer, list), f"{name} is of type {type(answer).__name__}, expected a list of token ids"
    vocab_size = base.config.vocab_size
    odd = [token for token in answer if type(token) is not int or not 0 <= token < vocab_size]
    assert not odd, (
        f"{name} holds {odd[0]!r} of type {type(odd[0]).__name__}, expected Python ints from 0 to {vocab_size - 1}"
    )
    assert given == prompt, f"the prompt belongs to the caller, but it was changed from {prompt} to {given}"
    assert len(answer) <= count, (
        f"{name} has {len(answer)} tokens, but max_new_tokens is {count}; the prompt is not part of it"
    )
    for call, logits in enumerate(scores):
        shape = list(logits.shape)
        assert shape == [vocab_size], f"call {call} of on_logits got logits of shape {shape}, expected [{vocab_size}]"
    text_logits = hf_logits(base, prompt + answer)  # of the learner's own text, so that the first mistake is named

    def taken_from(index: tuple[int, ...]) -> str:
        same = torch.isclose(text_logits, scores[index[0]], atol=1e-9, rtol=0).all(dim=1).nonzero().flatten().tolist()
        wanted = f"wanted: the scores of text position {len(prompt) - 1 + index[0]}"
        return f"{wanted}, got those of position {same[0]}" if same else wanted

    if scores and len(scores) == len(answer):
        expected_logits = text_logits[len(prompt) - 1 : -1]
        axes = ("output token", "vocabulary entry")
        assert_same(torch.stack(scores), expected_logits, what="the logits given to on_logits", axes=axes, where=taken_from)
    end = base.config.eos_token_id
    expected = hf_greedy(base, prompt, count, end)  # type: ignore[arg-type]
    assert_same_tokens(answer, expected, what=f"{name} (end-of-sequence token {end}, max_new_tokens {count})")
    assert len(scores) == len(answer), (
        f"on_logits was called {len(scores)} times for {len(answer)} new tokens: once for each"
    )


@pytest.fixture
def loop(chapter: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks ``generate_one`` alone: ``greedy_token`` is the reference's."""
    monkeypatch.setattr(chapter, "greedy_token", lambda logits: int(logits.argmax()))

    def check(base: GPT2LMHeadModel, prompt: list[int], count: int) -> None:
        assert_continues(lambda given, report: chapter.generate_one(base, given, count, report), base, prompt, count)

    return check


@pytest.mark.task("0.2", hint="Build the text in a new list. The prompt belongs to the caller, and may be a tuple.")
def test_the_prompt_stays_as_it_was_given(loop: Callable[..., None], chapter: Any, seed: int) -> None:
    base = without_end(seed)
    for prompt in ([4], [1, 2, 3]):
        given = list(prompt)
        chapter.generate_one(base, given, 3, lambda logits: None)
        assert given == prompt, f"the prompt belongs to the caller, but it was changed from {prompt} to {given}"
        with hint("This prompt is a tuple. Use only what lists and tuples both have, or make a list of it first."):
            answer = chapter.generate_one(base, tuple(prompt), 3, lambda logits: None)
            expected = hf_greedy(base, prompt, 3)
            assert answer == expected, f"the answer to the tuple {tuple(prompt)} is {answer}, expected the list {expected}"


@pytest.mark.task(
    "0.2",
    hint="Call on_logits once for every new token, also for the last one and for the end-of-sequence token.",
)
@pytest.mark.parametrize("place", [None, 0, 1, 4])
def test_on_logits_is_called_once_for_every_new_token(
    loop: Callable[..., None], chapter: Any, seed: int, place: int | None
) -> None:
    prompt = [11, 12, 13]
    base = without_end(seed) if place is None else ending_at(place, prompt, seed)
    end = base.config.eos_token_id
    for count in (1, 2, 7):
        calls: list[Tensor] = []
        answer = chapter.generate_one(base, list(prompt), count, calls.append)
        if answer == hf_greedy(base, prompt, count, end):  # type: ignore[arg-type]  # wrong answers: see the other tests
            ends = f", which ends with the end-of-sequence token {end}," if answer[-1] == end else ""
            assert len(calls) == len(answer), (
                f"on_logits was called {len(calls)} times for the answer {answer}{ends} "
                f"with max_new_tokens {count}: it must be called once for each new token"
            )


@pytest.mark.task(
    "0.2", hint="Each new token is chosen by the scores of the last position. The text is the prompt, then the new tokens."
)
@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_the_loop_says_what_hugging_face_says(loop: Callable[..., None], seed: int, length: int) -> None:
    base = without_end(seed)
    prompt = torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    for count in (1, 2, 11):
        loop(base, prompt, count)


@pytest.mark.task("0.2", hint="The last new token is never an input of the model, so it needs no position.")
def test_a_text_may_fill_all_positions(loop: Callable[..., None], seed: int) -> None:
    base = without_end(seed)
    loop(base, [5] * (base.config.n_positions - 3), 3)


@pytest.mark.task("0.2", hint="A new token equal to model.config.eos_token_id ends the answer, and is part of it.")
@pytest.mark.parametrize("place", [0, 1, 4])
def test_the_end_of_sequence_ends_the_answer_and_belongs_to_it(loop: Callable[..., None], seed: int, place: int) -> None:
    prompt = [11, 12, 13]
    base = ending_at(place, prompt, seed)
    for count in (place + 1, place + 2, place + 9):  # the end comes with the last token, just before it, and long before it
        loop(base, prompt, count)


@pytest.mark.task("0.2", hint="Only a new token can end the answer. An end-of-sequence token in the prompt ends nothing.")
def test_an_end_of_sequence_in_the_prompt_ends_nothing(loop: Callable[..., None], seed: int) -> None:
    base = without_end(seed)
    prompt = next([token, 22, token] for token in range(97) if token not in hf_greedy(base, [token, 22, token], 4))
    base.config.eos_token_id = prompt[0]
    loop(base, prompt, 4)


class Rows:
    """Counts the rows of each forward pass of a model, and notes when ``on_logits`` was called in between."""

    def __init__(self, base: GPT2LMHeadModel) -> None:
        self.events: list[Any] = []
        cast(GPT2Block, base.transformer.h[0]).ln_1.register_forward_pre_hook(
            lambda _, given: self.events.append(given[0].shape[-2])
        )

    def report(self, logits: Tensor) -> None:
        self.events.append("report")

    @property
    def forwards(self) -> list[int]:
        return [event for event in self.events if event != "report"]


@pytest.mark.task(
    "0.2", hint="Each new token costs one forward pass over the whole text so far, and no other pass is needed."
)
def test_each_new_token_costs_one_forward_pass(loop: Callable[..., None], chapter: Any, seed: int) -> None:
    prompt, base = [11, 12, 13], without_end(seed)
    rows = Rows(base)
    answer = chapter.generate_one(base, list(prompt), 5, rows.report)
    count, got = len(answer), rows.forwards
    expected = [len(prompt) + index for index in range(count)]
    passes = f"for an answer of {count} tokens to a prompt of {len(prompt)}, the forward passes computed {got} rows"
    with hint("Do not use the model's own cache: in this chapter each pass computes all rows, with use_cache=False."):
        assert len(got) != count or min(got) >= len(prompt), f"{passes}, expected {expected}"
    with hint(
        "Write the loop yourself, and compute the logits once for each new token: on_logits and the choice share them."
    ):
        assert len(got) <= count, f"{passes}: {len(got)} passes, expected {count}"
    assert got == expected, f"{passes}, expected {expected}"
    turns = [event == "report" for event in rows.events]
    with hint("Call on_logits inside the loop, before the next forward pass: a server streams each token when it is there."):
        assert turns == [False, True] * count, (
            f"forward passes and calls of on_logits must take turns, but the order was {rows.events}"
        )


@pytest.mark.task("0.2", hint="The model decides by the whole text so far. Do not cut it at a length of your own.")
def test_a_text_may_be_longer_than_a_thousand_tokens(loop: Callable[..., None], seed: int) -> None:
    base = random_gpt2(seed=seed, n_positions=1100, n_layer=1, n_head=1, n_embd=4, tie_word_embeddings=False)
    base.config.eos_token_id = None
    prompt = torch.randint(97, (1040,), generator=torch.Generator().manual_seed(seed)).tolist()
    loop(base, prompt, 1)


@pytest.mark.task("0.2", hint="Token id 0 is a token like any other. Compare with eos_token_id, do not ask if it is true.")
def test_token_zero_can_be_the_end_of_sequence(loop: Callable[..., None], seed: int) -> None:
    prompt = [11, 12, 13]
    base = ending_at(2, prompt, seed)
    end = base.config.eos_token_id
    head = base.lm_head.weight.data
    head[[0, end]] = head[[end, 0]]  # the scores of both tokens change places
    base.config.eos_token_id = 0
    answer = hf_greedy(base, prompt, 9, 0)
    assert 0 in answer and len(answer) < 9
    loop(base, prompt, 9)


@pytest.mark.task("0.2", hint="Each prompt is answered alone: keep nothing from one call of generate_one to the next.")
def test_generate_answers_each_prompt_as_hugging_face_does(chapter: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1, 2, 3], [7] * 17, [96], [1, 2, 3], list(range(30))]
    base = ending_at(3, prompts[0], seed)
    scores: dict[int, list[Tensor]] = {}
    monkeypatch.setattr(chapter, "greedy_token", lambda logits: int(logits.argmax()))
    answers = chapter.generate(base, prompts, 12, lambda index, logits: scores.setdefault(index, []).append(logits.clone()))
    assert len(answers) == len(prompts), f"{len(prompts)} prompts got {len(answers)} answers"
    for index, prompt in enumerate(prompts):

        def replay(given: list[int], report: Callable[[Tensor], None], index: int = index) -> Any:
            for logits in scores.get(index, []):
                report(logits)
            return answers[index]

        assert_continues(replay, base, prompt, 12)
    assert chapter.generate(base, prompts, 12) == answers, "without on_logits the answers are other ones"
    other = without_end(seed + 1)
    again = chapter.generate(other, prompts[:2], 4)
    expected = [hf_greedy(other, prompt, 4) for prompt in prompts[:2]]
    assert again == expected, f"another model was given the same prompts; its answers are {again}, expected {expected}"


@pytest.mark.task("0.3", hint="Measure with generate and a hook, as the task describes.")
def test_the_second_half_of_an_answer_costs_more(chapter: Any, seed: int, record_property: Any) -> None:
    base = random_gpt2(seed=seed, n_positions=72, n_layer=1, n_embd=12)
    base.config.eos_token_id = None
    rows = Rows(base)
    hf_greedy(base, list(range(8)), 64)
    first, second = sum(rows.forwards[:32]), sum(rows.forwards[32:])
    assert len(rows.forwards) == 64
    assert_answer(
        chapter.answer_0_3,
        second / first,
        0.006,  # two decimals
        record_property,
        {
            "high": "The prompt is part of each pass. Divide the rows for the last 32 tokens by those for the first 32.",
            "low": "Divide the rows for the last 32 tokens by those for the first 32. Count rows, not forward passes.",
        },
    )
