"""A connection that sends no headers is given up; one that is being answered never is."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from pagebrain.server import connections
from pagebrain.server.connections import PunctualProtocol
from pagebrain.server.run import listen
from tests.support.event_loop import LoopThread

HEADERS_S = 0.4
LONG_S = 3 * HEADERS_S


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(connections, "HEADERS_S", HEADERS_S)
    app = FastAPI()

    @app.get("/quick")
    async def quick() -> str:
        return "here"

    @app.get("/long")
    async def long() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(6):
                await asyncio.sleep(LONG_S / 6)
                yield b"piece "

        return StreamingResponse(pieces())

    listener = listen("127.0.0.1", 0)
    with LoopThread() as loop:
        server = uvicorn.Server(uvicorn.Config(app, http=PunctualProtocol, log_config=None, lifespan="off"))
        serving = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), loop.loop)
        yield listener.getsockname()[:2]
        server.should_exit = True
        serving.result(20)


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    connection.settimeout(20)
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def read_until(connection: socket.socket, end: bytes) -> None:
    """Read an answer, in as many pieces as it comes."""
    connection.settimeout(20)
    received = b""
    while end not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece


@pytest.mark.parametrize("beginning", [b"", b"GET /quick HTTP/1.1\r\nHost: here\r\nX-Half: a head"])
def test_who_sends_no_headers_or_half_of_them_is_given_up(address: tuple[str, int], beginning: bytes) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(beginning)
        assert everything(connection) == b""


def test_the_next_request_has_the_same_deadline(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /quick HTTP/1.1\r\nHost: here\r\n\r\n")
        read_until(connection, b"here")
        connection.sendall(b"GET /quick HT")
        assert everything(connection) == b""


def test_a_long_answer_is_not_cut(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /quick HTTP/1.1\r\nHost: here\r\n\r\n")
        read_until(connection, b"here")
        began = time.monotonic()
        connection.sendall(b"GET /long HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        assert everything(connection).count(b"piece") == 6
        assert time.monotonic() - began > HEADERS_S  # the deadline passed meanwhile
