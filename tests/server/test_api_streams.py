"""How streams end: by the last token, by a client that leaves or does not read, by an engine that dies."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest

from pagebrain import SamplingParams
from pagebrain.outputs import OutputDelta
from pagebrain.server.api.sse import EventStream
from pagebrain.server.link.streams import RequestStream
from tests.server.support_in_process import ServerThread

LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}


# A client that leaves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [{}, {"n": 3}, {"prompt": ["Once", "Twice", "Thrice"]}, {"logprobs": 1}],
    ids=lambda more: "-".join(more) or "one",
)
def test_who_leaves_a_stream_frees_its_blocks(more: dict[str, Any], api: ServerThread) -> None:
    with httpx.stream("POST", f"{api.url}/v1/completions", json=LONG | {"stream": True} | more, timeout=30) as answer:
        next(answer.iter_bytes())
        streams = api.call(lambda: list(api.client._streams.values()))
        assert streams and not any(stream.is_finished for stream in streams)
    api.wait_until_idle()
    assert not any(stream.is_finished for stream in streams), "the streams ran to their end"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", LONG),
        ("/v1/completions", LONG | {"prompt": ["Once", "Twice"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True}),
    ],
    ids=["one", "list", "chat"],
)
def test_who_leaves_before_a_whole_answer_frees_its_blocks(path: str, body: dict[str, Any], api: ServerThread) -> None:
    streams: list[RequestStream] = []

    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            asked = asyncio.ensure_future(client.post(api.url + path, json=body, timeout=30))
            while not streams:
                await asyncio.sleep(0.01)
                streams.extend(api.call(lambda: list(api.client._streams.values())))
            asked.cancel()

    asyncio.run(leave())
    api.wait_until_idle()
    assert not any(stream.is_finished for stream in streams), "the streams ran to their end"


def test_openais_client_may_close_a_stream(api: ServerThread) -> None:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="storyteller", stream=True, extra_body={"ignore_eos": True}, **_openai(LONG)
        )
        next(stream)
        stream.close()
        api.wait_until_idle()


def _openai(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != "ignore_eos"}


# A server that ends ----------------------------------------------------------------------------------------------------


def test_a_dead_engine_fails_streams_answers_and_health_at_once() -> None:
    with ServerThread() as server:
        server.client.handle.step_s = 0.02
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="storyteller", stream=True, **_openai(LONG))
            first = next(stream)
            whole: list[httpx.Response] = []
            waiting = threading.Thread(target=lambda: whole.append(server.post("/v1/completions", LONG)))
            waiting.start()
            while server.call(lambda: server.client.num_streams) < 2:
                pass
            server.call(lambda: server.client.handle.die("out of memory"))
            with pytest.raises(openai.APIError) as broken:
                list(stream)
            assert first.choices and "out of memory" in broken.value.message
            waiting.join(10)
        assert whole[0].status_code == 503 and whole[0].json()["error"]["code"] == "engine_dead"
        for answer in (
            server.get("/health"),
            server.post("/v1/completions", LONG),
            server.post("/generate", {"prompt": "x"}),
        ):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_dead"
            assert "out of memory" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", LONG | {"stream": True}), ("/generate", {"prompt": "x"})])
def test_a_failing_stream_ends_with_an_error_event_and_nothing_after_it(path: str, body: dict[str, Any]) -> None:
    with ServerThread() as server:
        server.client.handle.step_s = 0.02
        with httpx.stream("POST", server.url + path, json=body, timeout=30) as answer:
            chunks = answer.iter_text()
            text = next(chunks)
            server.call(lambda: server.client.handle.die("gone"))
            text += "".join(chunks)
    *_, last = [line for line in text.split("\n\n") if line]
    assert set(json.loads(last.removeprefix("data: "))["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in text


def test_a_draining_server_takes_nothing_new_and_finishes_what_it_has() -> None:
    with ServerThread() as server:
        server.client.handle.step_s = 0.005
        body = LONG | {"max_tokens": 40, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
            chunks = answer.iter_text()
            text = next(chunks)
            server.call(server.client.begin_drain)
            for refused in (server.get("/health"), server.post("/v1/completions", LONG)):
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_shutting_down"
            text += "".join(chunks)
        assert text.count('"text"') >= 2 and text.endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_a_drain_cuts_short_is_not_taken_for_an_answer(path: str) -> None:
    body = LONG if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
    with ServerThread(chat_template="{{ messages[0].content }}") as server:
        server.client.handle.step_s = 0.02
        whole: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: whole.append(server.post(path, body)))
        waiting.start()
        with httpx.stream("POST", server.url + path, json=body | {"stream": True}, timeout=30) as answer:
            chunks = answer.iter_text()
            text = next(chunks)
            while server.call(lambda: server.client.num_streams) < 2:
                pass
            server.call(server.client.begin_drain)
            server.call(server.client.abort_all)
            text += "".join(chunks)
        waiting.join(10)
        assert '"finish_reason": "abort"' in text and text.endswith("data: [DONE]\n\n")
        assert whole[0].status_code == 503 and whole[0].json()["error"]["code"] == "server_shutting_down"


# The response by itself -------------------------------------------------------------------------------------------------


class _Plain:
    """One line for each delta."""

    def opening(self) -> str:
        return "start\n"

    def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str:
        return "".join(f"{prompt_index}:{delta.text}\n" for delta in deltas)

    def ending(self) -> str:
        return "end\n"


class _Exchange:
    """An event stream, the streams that it reads, and a client that can be slow or leave."""

    def __init__(self, count: int = 1, narrator: Any = None) -> None:
        self.closed: list[RequestStream] = []
        self.streams = [RequestStream(f"r{i}", (1,), SamplingParams(), self.closed.append) for i in range(count)]
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.takes = asyncio.Event()
        self.takes.set()
        self.response = EventStream(self.streams, narrator or _Plain())

    async def _receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        await self.takes.wait()

    def answer(self) -> "asyncio.Task[None]":
        return asyncio.ensure_future(self.response({"type": "http"}, self._receive, self._send))

    def put(self, text: str, reason: Any = None, index: int = 0) -> None:
        stream = self.streams[index]
        stream.put(OutputDelta(stream.request_id, 0, text, (5,), (), reason), 0.0)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def watched() -> None:
        await asyncio.wait_for(test(), 20)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks are left: {left}"

    asyncio.run(watched())


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_what_comes_while_a_client_is_slow_comes_in_one_piece() -> None:
    async def test() -> None:
        exchange = _Exchange()
        answer = exchange.answer()
        exchange.put("a")
        await _settle()
        exchange.takes.clear()
        exchange.put("b")
        await _settle()
        for letter in "cdef":
            exchange.put(letter)
            await _settle()
        exchange.takes.set()
        exchange.put("g", "length")
        await answer
        assert [message.get("body") for message in exchange.sent][2:] == [b"0:a\n", b"0:b\n", b"0:cdefg\n", b"end\n"]
        assert [message.get("more_body") for message in exchange.sent] == [None, True, True, True, True, False]
        assert exchange.closed == exchange.streams

    _run(test)


def test_several_streams_are_told_as_they_come_and_the_response_ends_with_the_last() -> None:
    async def test() -> None:
        exchange = _Exchange(count=3)
        answer = exchange.answer()
        for index, text in ((2, "x"), (0, "y")):
            exchange.put(text, index=index)
            await _settle()
        exchange.put("last of 0", "stop", index=0)
        exchange.put("last of 1", "stop", index=1)
        await _settle()
        assert not answer.done()
        exchange.put("last of 2", "stop", index=2)
        await answer
        assert exchange.text == "start\n2:x\n0:y\n0:last of 0\n1:last of 1\n2:last of 2\nend\n"
        assert exchange.closed == exchange.streams

    _run(test)


@pytest.mark.parametrize("count", [1, 3])
def test_a_disconnect_closes_all_streams_even_while_nothing_comes(count: int) -> None:
    async def test() -> None:
        exchange = _Exchange(count)
        answer = exchange.answer()
        await _settle()
        exchange.left.set()
        await answer
        assert exchange.closed == exchange.streams and "end" not in exchange.text

    _run(test)


def test_a_disconnect_counts_while_the_client_takes_nothing() -> None:
    async def test() -> None:
        exchange = _Exchange()
        exchange.takes.clear()
        answer = exchange.answer()
        await _settle()
        exchange.left.set()
        await answer
        assert exchange.closed == exchange.streams

    _run(test)


@pytest.mark.parametrize("count", [1, 2])
def test_cancelling_the_response_closes_the_streams(count: int) -> None:
    async def test() -> None:
        exchange = _Exchange(count)
        answer = exchange.answer()
        await _settle()
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        assert exchange.closed == exchange.streams

    _run(test)


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_mid_stream_is_an_event_and_says_nothing_of_the_inside(count: int) -> None:
    class Broken(_Plain):
        def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str:
            raise ValueError("a secret")

    async def test() -> None:
        exchange = _Exchange(count, Broken())
        answer = exchange.answer()
        exchange.put("a")
        await answer
        last = exchange.sent[-1]
        error = json.loads(last["body"].decode().removeprefix("data: "))["error"]
        assert error["type"] == "server_error" and "secret" not in error["message"] and last["more_body"] is False
        assert exchange.closed == exchange.streams

    _run(test)


def test_a_response_that_cannot_be_sent_raises_instead_of_ending_quietly() -> None:
    async def test() -> None:
        exchange = _Exchange()

        async def send(message: Any) -> None:
            raise RuntimeError("not now")

        with pytest.raises(RuntimeError, match="not now"):
            await exchange.response({"type": "http"}, exchange._receive, send)
        assert exchange.closed == exchange.streams

    _run(test)


def test_a_send_that_fails_is_a_client_that_left() -> None:
    async def test() -> None:
        exchange = _Exchange()

        async def send(message: Any) -> None:
            raise OSError("broken pipe")

        await exchange.response({"type": "http"}, exchange._receive, send)
        assert exchange.closed == exchange.streams

    _run(test)
