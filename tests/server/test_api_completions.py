"""``/v1/completions`` through OpenAI's own client: the tokens are those that ``LLM.generate`` gives for the same request."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pagebrain import LLM, SamplingParams
from tests.server.support_in_process import ServerThread

PROMPT = "Once upon a time"
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(api: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def _texts(offline: LLM, prompts: list[Any], **params: Any) -> list[str]:
    outputs = offline.generate(prompts, SamplingParams(**params), use_tqdm=False)
    return [sample.text for output in outputs for sample in output.outputs]


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0, "max_tokens": 30},
        SAMPLED,
        SAMPLED | {"presence_penalty": 1.5, "frequency_penalty": -0.5},
        SAMPLED | {"logit_bias": {"300": 5, "301": -100}},
        SAMPLED | {"stop": ["the", "and"]},
        SAMPLED | {"stop": "and"},
    ],
    ids=["greedy", "sampled", "penalties", "bias", "stops", "stop"],
)
def test_openai_parameters_give_the_offline_text(asked: dict[str, Any], client: openai.OpenAI, offline: LLM) -> None:
    answer = client.completions.create(model="storyteller", prompt=PROMPT, **asked)
    bias = {int(token): value for token, value in asked.get("logit_bias", {}).items()}
    [output] = offline.generate(PROMPT, SamplingParams(**(asked | {"logit_bias": bias})), use_tqdm=False)
    assert answer.choices[0].text == output.outputs[0].text
    assert answer.choices[0].finish_reason == output.outputs[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)
    assert answer.usage.completion_tokens == len(output.outputs[0].token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(
    "extra",
    [
        {"top_k": 3},
        {"min_p": 0.3},
        {"repetition_penalty": 1.8},
        {"stop_token_ids": list(range(250, 330))},
        {"stop_token_ids": list(range(250, 330)), "min_tokens": 6},
        {"stop_token_ids": list(range(250, 330)), "include_stop_str_in_output": True},
        {"ignore_eos": True, "logit_bias": {"2047": 100}, "skip_special_tokens": False},
        {"ignore_eos": False, "logit_bias": {"2047": 100}},
    ],
    ids=lambda extra: "-".join(extra),
)
def test_parameters_beyond_openai_have_their_effect(extra: dict[str, Any], client: openai.OpenAI, offline: LLM) -> None:
    answer = client.completions.create(model="storyteller", prompt=PROMPT, **SAMPLED, extra_body=extra)
    bias = {int(token): value for token, value in extra.get("logit_bias", {}).items()}
    assert [answer.choices[0].text] == _texts(offline, [PROMPT], **(SAMPLED | extra | {"logit_bias": bias}))
    assert [answer.choices[0].text] != _texts(offline, [PROMPT], **SAMPLED)


def test_a_stream_adds_up_to_the_answer_and_counts_its_tokens_at_the_end(client: openai.OpenAI, offline: LLM) -> None:
    asked: dict[str, Any] = SAMPLED | {"stop": ["dragon"]}
    stream = client.completions.create(
        model="storyteller", prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **asked
    )
    events = list(stream)
    pieces, [last] = events[:-1], events[-1:]
    assert ["".join(event.choices[0].text for event in pieces)] == _texts(offline, [PROMPT], **asked)
    assert [event.choices[0].finish_reason for event in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len(pieces) > 5, "the tokens came in one piece"
    assert all(event.usage is None for event in pieces)
    assert not last.choices and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (4, 24, 28)
    assert len({(event.id, event.created, event.model, event.object) for event in events}) == 1
    assert events[0].id.startswith("cmpl-") and len(events[0].id) == len("cmpl-") + 32


def test_a_stream_without_usage_asked_for_has_none(client: openai.OpenAI) -> None:
    events = list(client.completions.create(model="storyteller", prompt=PROMPT, stream=True, max_tokens=3))
    assert all(event.choices and "usage" not in event.model_extra for event in events if event.model_extra is not None)
    assert all(event.usage is None for event in events)


def test_max_tokens_is_16_unless_said(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="storyteller", prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "prompts",
    [["Once upon a time", "The old clock"], [[400, 401], [500, 501, 502], [7]]],
    ids=["texts", "ids"],
)
def test_several_prompts_with_several_samples_are_numbered_prompt_by_prompt(
    prompts: list[Any], stream: bool, client: Any, offline: LLM
) -> None:
    asked = SAMPLED | {"n": 3}
    texts = [""] * (3 * len(prompts))
    reasons: list[str | None] = [None] * len(texts)
    if stream:
        for event in client.completions.create(model="storyteller", prompt=prompts, stream=True, **asked):
            for piece in event.choices:
                texts[piece.index] += piece.text
                assert reasons[piece.index] is None, "an answer went on after its end"
                reasons[piece.index] = piece.finish_reason
    else:
        answer = client.completions.create(model="storyteller", prompt=prompts, **asked)
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        texts = [choice.text for choice in answer.choices]
        reasons = [choice.finish_reason for choice in answer.choices]
        assert answer.usage is not None
        outputs = offline.generate(prompts, SamplingParams(**asked), use_tqdm=False)
        assert answer.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
        assert answer.usage.completion_tokens == sum(len(s.token_ids) for output in outputs for s in output.outputs)
    assert texts == _texts(offline, prompts, **asked)
    assert None not in reasons
    assert len(set(texts)) > len(prompts), "the samples of a prompt are all the same"


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompt_of_token_ids_is_one_prompt(stream: bool, client: Any, offline: LLM) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 5}
    answer = client.completions.create(model="storyteller", prompt=[400, 401, 402], stream=stream, **asked)
    pieces = list(answer) if stream else [answer]
    assert ["".join(piece.choices[0].text for piece in pieces)] == _texts(offline, [[400, 401, 402]], **asked)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_each_answer(stream: bool, client: Any, offline: LLM) -> None:
    prompts = ["Once upon <|endoftext|> a time", "é🙂"]
    asked = SAMPLED | {"n": 2}
    texts = [""] * 4
    answer = client.completions.create(model="storyteller", prompt=prompts, echo=True, stream=stream, **asked)
    for event in answer if stream else [answer]:
        for piece in event.choices:
            texts[piece.index] += piece.text
    expected = _texts(offline, prompts, **asked)
    assert texts == [prompts[index // 2] + text for index, text in enumerate(expected)]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_writes_token_ids_as_text(stream: bool, client: Any, offline: LLM) -> None:
    assert offline.tokenizer is not None
    ids = offline.tokenizer.encode("Grandmother was é🙂")
    answer = client.completions.create(model="storyteller", prompt=ids, echo=True, max_tokens=0, stream=stream, n=2)
    texts = ["", ""]
    for event in answer if stream else [answer]:
        for piece in event.choices:
            texts[piece.index] += piece.text
            assert piece.finish_reason == "length"
    assert texts == ["Grandmother was é🙂"] * 2


def test_the_async_client_streams_many_answers_at_a_time(api: ServerThread, offline: LLM) -> None:
    prompts = [f"{name} went to the" for name in ("Mia", "Juno", "Arlo", "Vera", "Zoë", "Viktor")]

    async def ask(client: openai.AsyncOpenAI, prompt: str, stream: bool) -> str:
        if not stream:
            answer = await client.completions.create(model="storyteller", prompt=prompt, **SAMPLED)
            return str(answer.choices[0].text)
        events = await client.completions.create(model="storyteller", prompt=prompt, stream=True, **SAMPLED)
        return "".join([event.choices[0].text async for event in events])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, prompt, index % 2 == 0) for index, prompt in enumerate(prompts)))

    assert asyncio.run(ask_all()) == _texts(offline, prompts, **SAMPLED)


def test_a_null_is_as_good_as_nothing(api: ServerThread, offline: LLM) -> None:
    absent = ("n", "top_k", "stop", "logprobs", "echo", "user", "stream_options", "stream", "model", "logit_bias", "top_p")
    body = {"prompt": PROMPT, "temperature": 0} | dict.fromkeys(absent)
    answer = api.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    assert [answer.json()["choices"][0]["text"]] == _texts(offline, [PROMPT], temperature=0, max_tokens=16)


def test_the_user_stands_in_the_stream_for_the_request_log(api: ServerThread) -> None:
    seen: list[tuple[str, str | None]] = []

    class Watcher:
        def on_step(self, stats: object) -> None: ...
        def on_first_token(self, request: object, seconds: float) -> None: ...
        def on_tokens(self, num_tokens: int, gaps_s: list[float]) -> None: ...
        def on_finished(self, request: Any, outcome: str) -> None:
            seen.append((request.request_id, request.user))

    watcher = Watcher()
    api.call(lambda: api.client.observers.append(watcher))
    one = api.post("/v1/completions", {"prompt": PROMPT, "user": "ada", "max_tokens": 1}).json()
    two = api.post("/v1/completions", {"prompt": [PROMPT, PROMPT], "user": "bob", "max_tokens": 1}).json()
    api.call(lambda: api.client.observers.remove(watcher))
    assert seen == [(one["id"], "ada"), (f"{two['id']}-0", "bob"), (f"{two['id']}-1", "bob")]
