"""``/v1/chat/completions``: the template's text goes in, and the answer comes back as OpenAI's client expects it."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pagebrain import LLM, SamplingParams
from tests.server.support_in_process import ServerThread

MESSAGES: Any = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": [{"type": "text", "text": "About Mia,"}, {"type": "text", "text": "please."}]},
]
RENDERED = "system: You tell stories.\nuser: About Mia,\nplease.\nassistant:"
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_tokens": 20}


@pytest.fixture(scope="module")
def client(api: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def _texts(offline: LLM, **params: Any) -> list[str]:
    [output] = offline.generate(RENDERED, SamplingParams(**params), use_tqdm=False)
    return [sample.text for sample in output.outputs]


def test_an_answer_continues_what_the_template_wrote(client: openai.OpenAI, offline: LLM) -> None:
    answer = client.chat.completions.create(model="storyteller", messages=MESSAGES, n=3, **SAMPLED)
    assert [choice.message.content for choice in answer.choices] == _texts(offline, n=3, **SAMPLED)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    assert answer.usage is not None and offline.tokenizer is not None
    assert answer.usage.prompt_tokens == len(offline.tokenizer.encode(RENDERED))
    assert answer.usage.completion_tokens == 60


def test_a_stream_says_who_speaks_then_what_then_why_it_ended(client: openai.OpenAI, offline: LLM) -> None:
    events = list(
        client.chat.completions.create(
            model="storyteller", messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}, **SAMPLED
        )
    )
    *pieces, last = events
    for index, text in enumerate(_texts(offline, n=2, **SAMPLED)):
        own = [choice for event in pieces for choice in event.choices if choice.index == index]
        assert [choice.delta.role for choice in own] == ["assistant"] + [None] * (len(own) - 1)
        assert own[0].delta.content == "" and own[-1].delta.content is None
        assert "".join(choice.delta.content or "" for choice in own) == text
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]
        assert len(own) > 5, "the tokens came in one piece"
    assert {event.object for event in events} == {"chat.completion.chunk"}
    assert not last.choices and last.usage is not None and last.usage.completion_tokens == 40


def test_without_a_limit_an_answer_goes_on_to_its_end(client: openai.OpenAI, offline: LLM) -> None:
    answer = client.chat.completions.create(model="storyteller", messages=MESSAGES, temperature=0, stop=["."])
    assert [answer.choices[0].message.content] == _texts(offline, temperature=0, stop=["."])
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit_count(name: str, api: ServerThread) -> None:
    body = {"messages": MESSAGES, name: 3, "ignore_eos": True}
    assert api.post("/v1/chat/completions", body).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"top_logprobs": 2}, "top_logprobs", "'logprobs' to be true"),
        ({"logprobs": 2}, "logprobs", "boolean"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hello"}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "non-empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name", "valid string"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls", "only as []"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight", "not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "no other kind"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "messages", "developers have no say here"),
        ({"prompt": "x"}, "prompt", "not supported"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    change: dict[str, Any], param: str, words: str, api: ServerThread
) -> None:
    answer = api.post("/v1/chat/completions", {"messages": MESSAGES} | change)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"], error


def test_a_long_chat_is_rendered_and_refused_like_a_short_one(api: ServerThread) -> None:
    for words in (2_000, 50_000):
        body = {"messages": [{"role": "user", "content": "once more " * words}]}
        answer = api.post("/v1/chat/completions", body)
        assert answer.status_code == 400 and "shorten it" in answer.json()["error"]["message"]


def test_a_model_without_a_template_says_so() -> None:
    with ServerThread() as server:
        answers = [
            server.post("/v1/chat/completions", {"messages": MESSAGES}),
            server.post("/tokenize", {"messages": MESSAGES}),
        ]
    for answer in answers:
        assert answer.status_code == 400
        assert "no chat template" in answer.json()["error"]["message"]
        assert "--chat-template" in answer.json()["error"]["message"]
