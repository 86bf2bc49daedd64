"""Work that would stop the event loop is done in small pieces, or in a thread, and comes to the same."""

import asyncio
import json
import threading
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from pagebrain import SamplingParams
from pagebrain.server.api import body, heavy, logprob_json, sse, whole
from pagebrain.server.api.heavy import CHUNK_BYTES, json_pieces, later_chunk, next_chunk
from pagebrain.server.api.protocol import ChatRequest, CompletionRequest, DetokenizeRequest
from pagebrain.server.api.service import MAX_ITEMS, num_items
from tests.server.support_in_process import ServerThread


def _written(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize(
    "value",
    [
        {"a": {}, "b": [], "c": None, "é": True, "text": ""},
        {"tokens": list(range(40_000)), "count": 2000},
        {"prompt": 'é "quoted"\n\U0001f642' * 4000},
    ],
    ids=lambda value: _written(value)[:40],
)
def test_json_written_in_pieces_is_the_json_written_at_once(value: dict[str, Any]) -> None:
    assert "".join(json_pieces(value)) == _written(value)
    packed = {name: array("i", member) if name == "tokens" else member for name, member in value.items()}
    assert "".join(json_pieces(packed)) == _written(value)
    assert max(map(len, json_pieces(value))) < 220_000


def test_a_number_that_json_lacks_is_an_error_in_pieces_too() -> None:
    with pytest.raises(ValueError, match="JSON"):
        list(json_pieces({"logprob": float("nan")}))


def test_pieces_are_sent_in_chunks_that_are_not_small() -> None:
    chunks = []
    pieces = iter(["x" * 10_000] * 20)
    while chunk := next_chunk(pieces):
        chunks.append(len(chunk))
    assert chunks == [70_000, 70_000, 60_000] and chunks[0] >= CHUNK_BYTES


def test_of_several_answers_one_chunk_is_written_in_a_turn_of_the_event_loop() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        turn, written = 0, []

        def count() -> None:
            nonlocal turn
            turn += 1
            loop.call_soon(count)

        def pieces() -> Iterator[str]:
            while True:
                written.append(turn)
                yield "x" * CHUNK_BYTES

        async def answer() -> None:
            mine = pieces()
            for _ in range(5):
                await later_chunk(mine)

        count()
        await asyncio.gather(*[answer() for _ in range(4)])
        assert len(written) == 20 == len(set(written)), "two chunks were written in one turn"

    asyncio.run(scenario())


SCORED: dict[str, Any] = {"prompt": ["Once", "Twice upon"], "n": 3, "max_tokens": 5, "logprobs": 2, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "logprobs": True, "temperature": 0}


@pytest.fixture
def everything_is_long(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Answers are written token by token, and each piece is a chunk. Lists the sizes of chunks after the first."""
    sizes: list[int] = []

    async def watched(pieces: Iterator[str]) -> bytes:
        chunk = await later_chunk(pieces)
        sizes.append(len(chunk))
        return chunk

    monkeypatch.setattr(logprob_json, "NUM_AT_A_TIME", 1)
    for module in (heavy, whole, sse):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    for module in (whole, sse):
        monkeypatch.setattr(module, "later_chunk", watched)
    return sizes


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", SCORED),
        ("/v1/completions", SCORED | {"logprobs": None}),
        ("/v1/completions", SCORED | {"echo": True}),
        ("/v1/completions", SCORED | {"echo": True, "n": 1}),
        ("/v1/completions", SCORED | {"prompt": "Once upon a time é🙂", "echo": True, "max_tokens": 0}),
        ("/v1/chat/completions", CHAT | {"n": 2}),
        ("/tokenize", {"prompt": "Once upon a time"}),
        ("/detokenize", {"tokens": [1085, 1084, 258, 733]}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_an_answer_is_the_same_however_it_is_made(
    path: str, fields: dict[str, Any], api: ServerThread, everything_is_long: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = api.post(path, fields)
    assert len(everything_is_long) >= 3 and "content-length" not in long.headers
    monkeypatch.undo()
    short = api.post(path, fields)
    assert int(short.headers["content-length"]) == len(short.content)
    answers = [long.json(), short.json()]
    for answer in answers:
        answer.pop("id", None)
        answer.pop("created", None)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("prompt", ["Once", ["Once", "Twice upon"]], ids=["one prompt", "two prompts"])
def test_a_streams_events_are_the_same_however_they_are_made(
    prompt: Any, api: ServerThread, everything_is_long: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choices() -> dict[int, list[Any]]:
        text = api.post("/v1/completions", SCORED | {"prompt": prompt, "n": 2, "stream": True, "echo": True}).text
        events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if "{" in line]
        joined: dict[int, list[Any]] = {}
        for piece in [event["choices"][0] for event in events]:
            own = joined.setdefault(piece["index"], ["", *([] for _ in piece["logprobs"])])
            own[0] += piece["text"]
            for items, new in zip(own[1:], piece["logprobs"].values(), strict=True):
                items += new
        return joined

    long = choices()
    assert len(everything_is_long) >= 3
    monkeypatch.undo()
    assert choices() == long


def test_a_big_body_is_read_in_a_thread_and_a_small_one_is_not(api: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[bool] = []
    parse, loop = body.parse_json, api.call(threading.get_ident)

    def watched(data: bytes) -> Any:
        readers.append(threading.get_ident() == loop)
        return parse(data)

    monkeypatch.setattr(body, "parse_json", watched)
    for size in (10, body.BIG_BODY):
        assert api.post("/tokenize", {"prompt": "x" * size}).status_code == 200
    assert readers == [True, False]


@pytest.mark.parametrize(
    ("kind", "request_body"),
    [
        (ChatRequest, {"messages": [{"name": 1}] * 1000}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": [1.5] * 1000}),
        (DetokenizeRequest, {"tokens": ["x"] * 60_000}),
    ],
)
def test_a_list_is_checked_up_to_its_first_mistake(kind: Any, request_body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(request_body)
    assert len(refused.value.errors()) <= 3  # of the first item


# How much may be asked for --------------------------------------------------------------------------------------------


def test_items_are_the_tokens_and_log_probabilities_of_an_answer() -> None:
    assert num_items(SamplingParams(n=3), 10, 7) == 7
    assert num_items(SamplingParams(n=3, logprobs=0), 10, 7) == 7
    assert num_items(SamplingParams(n=3, logprobs=5), 10, 7) == 7 * 6
    assert num_items(SamplingParams(n=3, logprobs=5, prompt_logprobs=5), 10, 7) == 7 * 6 + 3 * 10 * 6


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "Once", "n": 128, "max_tokens": 1000, "logprobs": 20}),
        ("/v1/completions", {"prompt": "Once", "n": 128, "max_tokens": 10**30, "logprobs": 20, "stream": True}),
        ("/v1/completions", {"prompt": [[5] * 1000] * 8, "n": 128, "max_tokens": 0, "echo": True, "logprobs": 1}),
        ("/v1/chat/completions", CHAT | {"n": 128, "max_tokens": None, "top_logprobs": 20}),
    ],
    ids=["whole", "stream", "echo", "chat"],
)
def test_more_than_a_server_can_hold_is_refused_by_name(path: str, fields: dict[str, Any], api: ServerThread) -> None:
    answer = api.post(path, fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "n"
    for words in ("'n'", "'max_tokens'", "'logprobs'", str(MAX_ITEMS)):
        assert words in error["message"]
    api.wait_until_idle()


def test_what_is_cut_at_the_models_limit_counts_as_cut(api: ServerThread) -> None:
    body = {"prompt": "Once", "n": 2, "max_tokens": MAX_ITEMS, "stop": ["e"], "logprobs": 20, "temperature": 0}
    assert api.post("/v1/completions", body).status_code == 200
