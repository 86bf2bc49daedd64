"""A small app behind the guards, in process and behind a real uvicorn, and raw sockets for what no client would send."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from pagebrain.server.guards.body_guard import BODY_TIMEOUT_S
from pagebrain.server.guards.connections import HttpConnection
from pagebrain.server.guards.requests_guard import add_guards
from pagebrain.server.live.routes import ASSETS
from pagebrain.server.options import ServerOptions

ASSET = f"/live/{next(iter(ASSETS))}"


class GuardedApp:
    """An app with the paths that matter to the guards.

    Attributes:
        bodies: of the requests that got through, in order.
        arrivals_s, called_s: when these had arrived, by the guards' account, and when the app heard of them.
        disconnects: how many streams have seen their client go.
        quoted: the message of what ``/fail`` raises.
    """

    def __init__(self, body_timeout_s: float = BODY_TIMEOUT_S, **options: Any) -> None:
        self.bodies: list[bytes] = []
        self.arrivals_s: list[float] = []
        self.called_s: list[float] = []
        self.disconnects = 0
        self.quoted = "the secret prompt"
        self.app = FastAPI()
        add_guards(self.app, ServerOptions(**options), body_timeout_s)

        async def answer(request: Request) -> dict[str, int]:
            self.bodies.append(await request.body())
            self.arrivals_s.append(getattr(request.state, "arrival_s", -1.0))
            self.called_s.append(time.monotonic())
            return {"length": len(self.bodies[-1])}

        async def fail() -> None:
            raise RuntimeError(self.quoted)

        for path in ("/health", "/metrics", "/v1/models", "/live", "/live/feed", ASSET):
            self.app.add_api_route(path, answer, methods=["GET"])
        for path in ("/v1/completions", "/live/control"):
            self.app.add_api_route(path, answer, methods=["POST"])
        self.app.add_api_route("/fail", fail, methods=["GET"])
        self.app.add_api_route("/stream", self._stream, methods=["POST"], response_model=None)

    async def _stream(self, request: Request) -> Response:
        self.bodies.append(await request.body())

        async def pieces() -> AsyncIterator[bytes]:
            try:
                for number in range(1000):
                    yield b"data: %d\n\n" % number
                    await asyncio.sleep(0.005)
            finally:
                self.disconnects += number < 999

        return StreamingResponse(pieces(), media_type="text/event-stream")

    def request(self, method: str, path: str, **settings: Any) -> httpx.Response:
        """One request, in process."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, **settings)

        return asyncio.run(send())


class LiveApp(GuardedApp):
    """The same behind a real uvicorn on a free port. Use as a context."""

    def __enter__(self) -> "LiveApp":
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, http=HttpConnection, log_config=None, lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()

    def connect(self) -> socket.socket:
        """A plain connection."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.settimeout(10)
        return connection

    def say(self, *pieces: bytes, pause_s: float = 0.0) -> bytes:
        """Send pieces over a connection of their own; returns all that is answered until the server closes it."""
        with self.connect() as connection:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
            return answer


def post_head(*lines: str, path: str = "/v1/completions") -> bytes:
    """The head of a POST with these header lines."""
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines, "", ""]
    ).encode()


def status_of(answer: bytes) -> int:
    """The status code of a raw answer."""
    return int(answer.split(b" ", 2)[1])


def wait_for(holds: Any, timeout_s: float = 10.0) -> bool:
    """Whether something comes to hold."""
    until = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(holds())
