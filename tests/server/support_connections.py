"""An application that is all about connections, behind the server's own protocol, on either event loop; and bare sockets."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
import uvloop
from starlette.types import Message, Receive, Scope, Send

from pagebrain.server.guards.connections import HttpConnection
from pagebrain.server.run import listen
from tests.support.event_loop import LoopThread

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


class Desk:
    """The application. Its paths say how it answers.

    ``/echo``: what it got, as JSON. ``/hold`` and ``/stream``: ``done`` once :attr:`released`, in one piece of known length,
    or begun before. ``/big``: :attr:`big` in one piece. ``/early``: before the body is read. ``/half``: begun and left.

    Attributes:
        called: paths, in order.
        waiting: those that wait to be released.
        gone: those whose client went before.
    """

    big = b"0123456789abcdef" * 2**19

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.called: list[str] = []
        self.waiting: list[str] = []
        self.gone: list[str] = []
        self.released = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.called.append(path)
        if path == "/early":
            await answer(send, b"early")
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.append(path)
                return
            body, more = body + message["body"], message["more_body"]
        if path == "/big":
            await answer(send, self.big)
        elif path == "/half":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        elif path in ("/hold", "/stream"):
            await self._wait(path, receive, send)
        else:
            await answer(send, json.dumps(_seen(scope, body)).encode())

    async def _wait(self, path: str, receive: Receive, send: Send) -> None:
        if path == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        self.waiting.append(path)
        released = asyncio.ensure_future(self.released.wait())
        gone: asyncio.Future[Message] = asyncio.ensure_future(receive())
        await asyncio.wait((released, gone), return_when="FIRST_COMPLETED")
        if not released.done():
            released.cancel()
            self.gone.append(path)
            return
        gone.cancel()
        if path == "/stream":
            await send({"type": "http.response.body", "body": b"do", "more_body": True})
            await send({"type": "http.response.body", "body": b"ne"})
        else:
            await answer(send, b"done")


async def answer(send: Send, body: bytes) -> None:
    """An answer of known length."""
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _seen(scope: Scope, body: bytes) -> dict[str, Any]:
    return {
        "method": scope["method"],
        "path": scope["path"],
        "version": scope["http_version"],
        "headers": [name.decode() for name, _ in scope["headers"]],
        "body": body.decode("latin-1"),
    }


class Served:
    """A running server of a :class:`Desk`.

    Attributes:
        connections: those that are open; they belong to the loop's thread.
    """

    def __init__(self, desk: Desk, loop: LoopThread, address: tuple[str, int], connections: set[Any]) -> None:
        self.desk = desk
        self.loop = loop
        self.address = address
        self.connections = connections

    def connect(self) -> socket.socket:
        """A connection that fails rather than waiting for ever."""
        return socket.create_connection(self.address, timeout=20)

    def say(self, *pieces: bytes, half_close: bool = False) -> bytes:
        """Send pieces over a connection of their own; returns what comes until the server closes it."""
        with self.connect() as connection:
            for piece in pieces:
                connection.sendall(piece)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return everything(connection)

    def forget(self) -> None:
        """As if the server had just been started."""

        async def forget() -> None:
            self.desk.forget()

        self.loop.run(forget())

    def release(self) -> None:
        """Let those that wait be answered."""
        self.loop.loop.call_soon_threadsafe(self.desk.released.set)


@contextlib.contextmanager
def serving(loop: str = "asyncio", keep_alive_s: float = 60.0) -> Iterator[Served]:
    """A server on a free port, on one of :data:`LOOPS`."""
    desk, listener = Desk(), listen("127.0.0.1", 0)
    config = uvicorn.Config(
        desk,
        http=HttpConnection,
        timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=1,
        log_config=None,
        lifespan="off",
    )
    with LoopThread(LOOPS[loop]()) as thread:
        server = uvicorn.Server(config)
        end = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), thread.loop)
        yield Served(desk, thread, listener.getsockname()[:2], server.server_state.connections)
        server.should_exit = True
        end.result(20)


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = b""
    while piece := connection.recv(1 << 20):
        received += piece
    return received


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """What comes up to something that must come."""
    received = b""
    while end not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


def head(line: str, *headers: str) -> bytes:
    """The head of a request."""
    return "\r\n".join([line, "Host: localhost", *headers, "", ""]).encode()


def post(path: str, body: bytes = b"", *headers: str, version: str = "1.1") -> bytes:
    """A POST whose length is given."""
    return head(f"POST {path} HTTP/{version}", f"Content-Length: {len(body)}", *headers) + body


def chunked(*pieces: bytes) -> bytes:
    """A body in chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def split(answer: bytes) -> tuple[str, dict[str, str], bytes]:
    """Status line, headers and body of a raw answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return status, {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}, body


def error_of(answer: bytes) -> dict[str, Any]:
    """The error object of a raw answer, after a look at its shape."""
    _, headers, body = split(answer)
    error: dict[str, Any] = json.loads(body)["error"]
    assert headers["content-type"] == "application/json" and headers["connection"] == "close"
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def wait_for(holds: Callable[[], bool], otherwise: str, timeout_s: float = 20.0) -> None:
    """Wait until something holds."""
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, otherwise
        time.sleep(0.005)
