"""A made-up OpenAI server for the tests of ``bench serve``: it sends the tokens it is asked for, and fails when told to.

It runs in a thread, on asyncio's own streams, so that a test decides every byte that a client sees.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

VOCAB_SIZE = 211


@dataclass
class FakeServer:
    """What the server does, which a test may change between runs, and what it saw.

    Attributes:
        tokens_per_event: how many tokens share an event.
        delay_s: before each event.
        misbehaviour: number of the request (from 0, in the order in which they came) -> what to do wrong, or ``None``:
            ``busy`` (503 with Retry-After), ``broken`` (500), ``cut`` (the connection ends in mid-stream), ``unfinished``
            (no ``[DONE]``), ``error event``, ``aborted`` (finish_reason abort), ``empty`` (no token), ``hang``.
        has_usage: whether it counts tokens, as ``stream_options`` asks.
        requests: the bodies that came, in order.
        most_at_once: the largest number of requests under way together.
    """

    url: str = ""
    tokens_per_event: int = 1
    delay_s: float = 0.0
    misbehaviour: Callable[[int], str | None] = lambda number: None
    has_usage: bool = True
    api_key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    _under_way: int = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until the client closes it."""
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
                    _plain(writer, 401, {"error": {"message": "wrong key"}})
                elif head[0].startswith("GET /v1/models"):
                    _plain(writer, 200, {"data": [{"id": "fake-1", "vocab_size": VOCAB_SIZE}, {"id": "fake-2"}]})
                elif head[0].startswith("POST /v1/completions"):
                    self.headers.append(headers)
                    if not await self._complete(writer, json.loads(body)):
                        break
                else:
                    _plain(writer, 404, {"detail": "Not Found"})
                await writer.drain()
        writer.close()

    async def _complete(self, writer: asyncio.StreamWriter, request: dict[str, Any]) -> bool:
        """Stream one completion. False: the connection must end now."""
        wrong = self.misbehaviour(len(self.requests))
        self.requests.append(request)
        if wrong == "busy":
            _plain(writer, 503, {"error": {"message": "the queue is full"}}, "Retry-After: 1\r\n")
            return True
        if wrong == "broken":
            _plain(writer, 500, {"error": {"message": "the engine is gone"}})
            return True
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            return await self._stream(writer, request, wrong)
        finally:
            self._under_way -= 1

    async def _stream(self, writer: asyncio.StreamWriter, request: dict[str, Any], wrong: str | None) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        _chunk(writer, b": hello\n\n")
        left = 0 if wrong == "empty" else request["max_tokens"]
        while left > 0:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            number = min(left, self.tokens_per_event)
            left -= number
            reason = None if left else "abort" if wrong == "aborted" else "length"
            _event(writer, {"choices": [{"index": 0, "text": " word" * number, "finish_reason": reason}], "usage": None})
            await writer.drain()
            if wrong == "cut":
                return False
            if wrong == "hang":
                await asyncio.sleep(60)
            if wrong == "error event":
                _event(writer, {"error": {"message": "the engine died"}})
                break
        if self.has_usage and request["stream_options"]["include_usage"] and wrong != "error event":
            usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": request["max_tokens"]}
            _event(writer, {"choices": [], "usage": usage})
        if wrong != "unfinished":
            _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return True


@contextlib.contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A running fake server on a free port."""
    server = FakeServer()
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def start() -> None:
        listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        ready.set()

    def serve() -> None:
        loop.create_task(start())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def _plain(writer: asyncio.StreamWriter, status: int, payload: object, more: str = "") -> None:
    body = json.dumps(payload).encode()
    head = f"HTTP/1.1 {status} Because\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    writer.write(head.encode() + body)


def _event(writer: asyncio.StreamWriter, payload: object) -> None:
    _chunk(writer, b"data: " + json.dumps(payload).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
