"""OpenAI's own client against the real server: every way to ask gives the tokens that ``LLM.generate`` gives offline."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import openai
import pytest

from pagebrain import LLM, SamplingParams
from pagebrain.outputs import CompletionOutput
from tests.support.served import Served

KEY = "a-key-for-tests"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
MESSAGES: Any = [{"role": "system", "content": "Tell stories."}, {"role": "user", "content": "About Mia."}]
RENDERED = "system: Tell stories.\nuser: About Mia.\nassistant:"
PROMPT = "Once upon a time"
MODEL = "stories"
ASKED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 24, "n": 2}
USAGE: Any = {"include_usage": True}
POOL = ("--num-blocks=40", "--block-size=8", "--max-num-seqs=6", "--max-num-batched-tokens=32", "--dtype=float64")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATE)
    settings = ("--chat-template", str(template), "--api-key", KEY, "--served-model-name", MODEL)
    with Served(*POOL, *settings) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


class Offline:
    """The same model without a server."""

    def __init__(self) -> None:
        self.llm = LLM(num_blocks=200, dtype="float64")
        assert self.llm.tokenizer is not None
        texts = [self.llm.tokenizer.decode([token_id]) for token_id in range(self.llm.config.vocab_size or 0)]
        self.ids = {text: token_id for token_id, text in enumerate(texts)}

    def samples(self, prompt: str, **asked: Any) -> list[CompletionOutput]:
        """What a prompt gives."""
        [output] = self.llm.generate(prompt, SamplingParams(**asked), use_tqdm=False)
        return list(output.outputs)

    def ids_of(self, tokens: Iterable[str]) -> list[int]:
        """Ids of tokens that an answer names by their texts."""
        return [self.ids[token] for token in tokens]


@pytest.fixture(scope="module")
def offline() -> Offline:
    return Offline()


def compare(choices: list[Any], expected: list[CompletionOutput], offline: Offline) -> None:
    """A whole answer's choices, those of a completion."""
    assert len(choices) == len(expected)
    for index, (choice, sample) in enumerate(zip(choices, expected)):
        assert (choice.index, choice.text, choice.finish_reason) == (index, sample.text, sample.finish_reason)
        assert sample.logprobs is not None
        assert offline.ids_of(choice.logprobs.tokens) == list(sample.token_ids)
        assert choice.logprobs.token_logprobs == pytest.approx([score.logprob for score in sample.logprobs], abs=1e-9)
        for top, score in zip(choice.logprobs.top_logprobs, sample.logprobs, strict=True):
            assert offline.ids_of(top)[: len(score.top)] == [token_id for token_id, _ in score.top]


def compare_pieces(events: list[Any], expected: list[CompletionOutput], offline: Offline) -> None:
    """The same for the events of a stream."""
    for index, sample in enumerate(expected):
        own = [choice for event in events for choice in event.choices if choice.index == index]
        assert "".join(choice.text for choice in own) == sample.text
        tokens = [token for choice in own for token in choice.logprobs.tokens]
        assert offline.ids_of(tokens) == list(sample.token_ids)
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + [sample.finish_reason]


def compare_chat(choices: list[Any], expected: list[CompletionOutput], offline: Offline) -> None:
    for choice, sample in zip(choices, expected, strict=True):
        assert (choice.message.content, choice.finish_reason) == (sample.text, sample.finish_reason)
        assert sample.logprobs is not None
        for entry, score in zip(choice.logprobs.content, sample.logprobs, strict=True):
            assert offline.ids_of([entry.token]) == [score.token_id] and bytes(entry.bytes).decode() == entry.token
            assert entry.logprob == pytest.approx(score.logprob, abs=1e-9)
            assert offline.ids_of(top.token for top in entry.top_logprobs) == [token_id for token_id, _ in score.top]


def compare_chat_pieces(events: list[Any], expected: list[CompletionOutput], offline: Offline) -> None:
    for index, sample in enumerate(expected):
        own = [choice for event in events for choice in event.choices if choice.index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == sample.text
        tokens = [entry.token for choice in own if choice.logprobs for entry in choice.logprobs.content]
        assert offline.ids_of(tokens) == list(sample.token_ids)
        assert own[-1].finish_reason == sample.finish_reason


def test_completions(client: openai.OpenAI, offline: Offline) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, logprobs=3, **ASKED)
    compare(answer.choices, offline.samples(PROMPT, logprobs=3, **ASKED), offline)
    assert answer.usage is not None and answer.usage.completion_tokens == 48
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 48
    assert answer.model == MODEL


def test_beam_search_through_the_engine_process(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": PROMPT,
        "n": 3,
        "max_tokens": 6,
        "extra_body": {"use_beam_search": True},
    }
    first, again = client.completions.create(**asked), client.completions.create(**asked)
    assert len({choice.text for choice in first.choices}) == 3
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]


def test_streamed_completions_with_their_usage(client: openai.OpenAI, offline: Offline) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, logprobs=0, stream=True, stream_options=USAGE, stop=["the"], **ASKED
    )
    *events, last = stream
    expected = offline.samples(PROMPT, logprobs=0, stop=["the"], **ASKED)
    assert {sample.finish_reason for sample in expected} & {"stop"}, "the stop string is part of the test"
    compare_pieces(events, expected, offline)
    assert len(events) > 5, "the tokens came in one piece"
    assert last.usage is not None and not last.choices
    assert last.usage.completion_tokens == sum(len(sample.token_ids) for sample in expected)


def test_chats(client: openai.OpenAI, offline: Offline) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, **ASKED)
    compare_chat(answer.choices, offline.samples(RENDERED, logprobs=2, **ASKED), offline)
    assert answer.usage is not None and answer.usage.completion_tokens == 48


def test_streamed_chats_with_their_usage(client: openai.OpenAI, offline: Offline) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, stream=True, stream_options=USAGE, **ASKED
    )
    *events, last = stream
    compare_chat_pieces(events, offline.samples(RENDERED, logprobs=0, **ASKED), offline)
    assert last.usage is not None and last.usage.completion_tokens == 48


def test_everything_at_once_from_the_async_client(served: Served, offline: Offline) -> None:
    async def completion(client: openai.AsyncOpenAI, asked: dict[str, Any]) -> None:
        answer = await client.completions.create(model=MODEL, prompt=PROMPT, logprobs=1, **asked)
        compare(answer.choices, offline.samples(PROMPT, logprobs=1, **asked), offline)

    async def streamed(client: openai.AsyncOpenAI, asked: dict[str, Any]) -> None:
        stream = await client.completions.create(model=MODEL, prompt=PROMPT, logprobs=0, stream=True, **asked)
        compare_pieces([event async for event in stream], offline.samples(PROMPT, logprobs=0, **asked), offline)

    async def chat(client: openai.AsyncOpenAI, asked: dict[str, Any]) -> None:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, **asked)
        compare_chat(answer.choices, offline.samples(RENDERED, logprobs=0, **asked), offline)

    async def streamed_chat(client: openai.AsyncOpenAI, asked: dict[str, Any]) -> None:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, stream=True, **asked)
        compare_chat_pieces([event async for event in stream], offline.samples(RENDERED, logprobs=0, **asked), offline)

    ways: list[Callable[[openai.AsyncOpenAI, dict[str, Any]], Awaitable[None]]]
    ways = [completion, streamed, chat, streamed_chat]

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            await asyncio.gather(
                *(ways[seed % 4](client, ASKED | {"seed": seed, "temperature": 0.5 * (seed % 3)}) for seed in range(16))
            )

    asyncio.run(scenario())


def test_a_stream_that_the_client_closes_is_over(client: openai.OpenAI, served: Served) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()

    def aborted() -> bool:
        lines = served.get("/metrics", headers=key).text.splitlines()
        [line] = [line for line in lines if 'finished_reason="abort"' in line]
        return line.endswith(" 1.0")

    served.wait_until(aborted, "the request went on")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", [{"best_of": 3}, {"temperature": -1}, {"prompt": "word " * 2000}])
def test_a_mistake_is_a_bad_request_that_names_the_field(
    client: openai.OpenAI, change: dict[str, Any], stream: bool
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "stream": stream} | change
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**asked)
    assert caught.value.param == next(iter(change)) and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream, tool_choice="required")
    assert caught.value.param == "tool_choice"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-5", prompt=PROMPT)
    assert caught.value.code == "model_not_found" and MODEL in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES, stream=True)


def test_without_the_key_nobody_gets_in(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY + "!", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.completions.create(model=MODEL, prompt=PROMPT)
        assert caught.value.code == "invalid_api_key" and KEY not in caught.value.message
        with pytest.raises(openai.AuthenticationError):
            client.models.list()

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)

    asyncio.run(scenario())
