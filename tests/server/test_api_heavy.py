"""Work that would stop the event loop is done in a thread, in small pieces, and comes to the same."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from pagebrain import SamplingParams
from pagebrain.server import body, heavy, sse
from pagebrain.server.heavy import BIG_ANSWER, json_answer, json_pieces
from pagebrain.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest
from pagebrain.server.service import MAX_ITEMS, num_items
from tests.server.support_in_process import ServerThread


def _written(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _choice(num_tokens: int) -> dict[str, Any]:
    top = [{f"token {rank}": -rank / 3 for rank in range(21)} for _ in range(num_tokens)]
    logprobs = {"tokens": ["x"] * num_tokens, "token_logprobs": [-0.25] * num_tokens, "top_logprobs": top}
    return {"index": 0, "text": 'é "quoted"\n', "logprobs": logprobs, "finish_reason": None}


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"a": {}, "b": [], "c": None, "é": True},
        {"tokens": list(range(2000)), "count": 2000},
        {"choices": [_choice(num_tokens) for num_tokens in (0, 1, 256, 257, 700)], "usage": {"total_tokens": 5}},
        {"choices": [{"logprobs": {"content": [{"token": "x", "bytes": [1], "top_logprobs": []}] * 600}}]},
        [[1, 2], [3]],
        "text",
        5,
    ],
    ids=lambda value: _written(value)[:40],
)
def test_json_written_in_pieces_is_the_json_written_at_once(value: Any) -> None:
    assert "".join(json_pieces(value)) == _written(value)


def test_no_piece_of_a_big_answer_is_big() -> None:
    answers: list[Any] = [{"choices": [_choice(2000)] * 3}, {"tokens": list(range(100_000))}]
    for answer in answers:
        longest = max(map(len, json_pieces(answer)))
        assert longest < 0.1 * len(_written(answer)) and longest < 200_000


def test_a_number_that_json_lacks_is_an_error_in_pieces_too() -> None:
    with pytest.raises(ValueError, match="JSON"):
        list(json_pieces({"choices": [{"logprob": float("nan")}]}))


@pytest.mark.parametrize(("num_items", "is_elsewhere"), [(BIG_ANSWER, False), (BIG_ANSWER + 1, True)])
def test_a_big_answer_is_made_in_a_thread(num_items: int, is_elsewhere: bool) -> None:
    makers: list[int] = []

    def make() -> dict[str, Any]:
        makers.append(threading.get_ident())
        return {"text": "é", "n": 1}

    answer = asyncio.run(json_answer(make, num_items))
    assert (makers != [threading.get_ident()]) == is_elsewhere and len(makers) == 1
    assert json.loads(bytes(answer.body)) == {"text": "é", "n": 1} and answer.media_type == "application/json"


@pytest.fixture
def everything_is_big(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever can be done in the thread is. Lists the functions that were."""
    done: list[str] = []

    async def watched(function: Callable[..., Any], *args: Any) -> Any:
        done.append(function.__name__)
        return await in_turn(function, *args)

    in_turn = heavy.in_turn
    for module in (body, heavy, sse):
        monkeypatch.setattr(module, "in_turn", watched)
    for module in (heavy, sse):
        monkeypatch.setattr(module, "BIG_ANSWER", -1)
    monkeypatch.setattr(body, "BIG_BODY", -1)
    return done


SCORED: dict[str, Any] = {"prompt": ["Once", "Twice upon"], "n": 3, "max_tokens": 5, "logprobs": 2, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "logprobs": True, "temperature": 0}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", SCORED),
        ("/v1/completions", SCORED | {"echo": True}),
        ("/v1/completions", SCORED | {"prompt": "Once", "echo": True, "max_tokens": 0}),
        ("/v1/chat/completions", CHAT),
        ("/tokenize", {"prompt": "Once upon a time"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_an_answer_is_the_same_however_it_is_made(
    path: str, fields: dict[str, Any], api: ServerThread, everything_is_big: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    big = api.post(path, fields).json()
    assert everything_is_big[0] == "parse_json" and len(everything_is_big) == 2
    monkeypatch.undo()
    small = api.post(path, fields).json()
    for answer in (big, small):
        answer.pop("id", None)
        answer.pop("created", None)
    assert big == small


def test_a_streams_events_are_the_same_however_they_are_made(
    api: ServerThread, everything_is_big: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choices() -> list[Any]:
        text = api.post("/v1/completions", SCORED | {"prompt": "Once", "n": 1, "stream": True, "echo": True}).text
        events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if "{" in line]
        pieces = [event["choices"][0] for event in events]
        return ["".join(piece["text"] for piece in pieces)] + [
            [item for piece in pieces for item in piece["logprobs"][name]] for name in pieces[0]["logprobs"]
        ]

    big = choices()
    assert "tell" in everything_is_big
    monkeypatch.undo()
    assert choices() == big


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
