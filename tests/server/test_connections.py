"""How long connections last: without headers, without a request, with an answer that is not read; and no longer."""

import logging
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pagebrain import PageBrainConfig
from pagebrain.server.guards import connections
from pagebrain.server.guards.connections import HttpConnection
from pagebrain.server.options import ServerOptions
from pagebrain.server.run import _Life, listen
from tests.server.support_connections import (
    LOOPS,
    Served,
    everything,
    head,
    post,
    read_until,
    serving,
    wait_for,
)

HEADERS_S = 0.4
KEEP_ALIVE_S = 0.8
QUICK = head("GET /quick HTTP/1.1")


@pytest.fixture(params=LOOPS)
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(connections, "HEADERS_S", HEADERS_S)
    with serving(request.param) as served:
        yield served


@pytest.fixture(params=LOOPS)
def hasty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server that keeps idle connections only a little longer than headers may take."""
    monkeypatch.setattr(connections, "HEADERS_S", HEADERS_S)
    with serving(request.param, KEEP_ALIVE_S) as served:
        yield served


@pytest.mark.parametrize("beginning", [b"", b"\r\n", b"GET /quick HTTP/1.1\r\nHost: here\r\nX-Half: a head"])
def test_who_sends_no_headers_or_half_of_them_is_given_up(served: Served, beginning: bytes) -> None:
    assert served.say(beginning) == b""


def test_the_headers_of_the_next_request_have_the_same_deadline(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(QUICK)
        read_until(connection, b"/quick")
        began_s = time.monotonic()
        connection.sendall(b"GET /quick HT")
        assert everything(connection).count(b"HTTP/1.1") == 0
        assert time.monotonic() - began_s > 0.9 * HEADERS_S


def test_half_a_head_behind_a_long_answer_is_given_up_after_it_and_not_before(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(post("/hold") + b"GET /quick HT")
        wait_for(lambda: served.desk.waiting == ["/hold"], "the first request did not come")
        time.sleep(2 * HEADERS_S)
        served.release()
        assert everything(connection).endswith(b"done")


def test_an_idle_connection_is_kept_longer_than_headers_may_take_and_then_closed(hasty: Served) -> None:
    with hasty.connect() as connection:
        for _ in range(2):
            connection.sendall(QUICK)
            read_until(connection, b"/quick")
            began_s = time.monotonic()
            time.sleep(1.5 * HEADERS_S)
        assert everything(connection) == b""
        assert time.monotonic() - began_s > 0.9 * KEEP_ALIVE_S


def test_a_request_that_is_here_when_the_connection_would_be_closed_is_answered(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(QUICK)
        read_until(connection, b"/quick")
        is_busy, is_sent = threading.Event(), threading.Event()

        def be_late() -> None:
            is_busy.set()
            assert is_sent.wait(20)
            [late] = served.connections
            late._close_late()  # the timer, which may come before what is to be read

        served.loop.loop.call_soon_threadsafe(be_late)
        assert is_busy.wait(20)
        connection.sendall(QUICK)
        is_sent.set()
        assert b"/quick" in read_until(connection, b"/quick")


def test_a_long_answer_is_not_cut(hasty: Served) -> None:
    with hasty.connect() as connection:
        connection.sendall(post("/hold"))
        wait_for(lambda: hasty.desk.waiting == ["/hold"], "the request did not come")
        time.sleep(1.5 * KEEP_ALIVE_S)
        hasty.release()
        assert read_until(connection, b"done").startswith(b"HTTP/1.1 200")


def test_the_option_reaches_the_connections_and_is_long_by_default() -> None:
    assert ServerOptions().keep_alive_s >= 120
    options = ServerOptions(port=0, keep_alive_s=7.5)
    listener = listen(options.host, options.port)
    config = _Life(PageBrainConfig(), options, listener, 1)._make_server().config
    listener.close()
    assert config.timeout_keep_alive == 7.5 and config.http is HttpConnection


# Slow readers ---------------------------------------------------------------------------------------------------------


def slow_connection(served: Served) -> socket.socket:
    """A connection whose client's system takes only a little ahead of the client."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(served.address)
    return connection


def test_a_client_that_takes_a_little_at_a_time_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALL_S", 0.8)
    with serving("uvloop") as served, slow_connection(served) as connection:
        connection.sendall(head("GET /big HTTP/1.1", "Connection: close"))
        received, began_s = b"", time.monotonic()
        while time.monotonic() - began_s < 3 * connections.STALL_S:
            received += connection.recv(4096)
            time.sleep(0.02)
        assert served.desk.big.startswith(received.partition(b"\r\n\r\n")[2])
        assert len(received) < len(served.desk.big) / 8, "nothing was left to take: the test shows nothing"
        assert connection.recv(4096)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_takes_nothing_is_given_up_without_a_traceback(
    loop: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "STALL_S", 0.4)
    with caplog.at_level(logging.INFO), serving(loop) as served, slow_connection(served) as connection:
        connection.sendall(head("GET /big HTTP/1.1"))
        wait_for(lambda: "received nothing for 0.4 seconds" in caplog.text, "the client was not given up")
        with pytest.raises(ConnectionError):
            everything(connection)
    assert not [record for record in caplog.records if record.levelno > logging.INFO or record.exc_info]
