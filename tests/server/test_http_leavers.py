"""Clients that close their sending side and still read get their answers; clients that have gone are given up at once."""

import logging
import socket
from collections.abc import Iterator

import pytest

from tests.server.support_connections import (
    LOOPS,
    Served,
    chunked,
    error_of,
    everything,
    head,
    post,
    serving,
    split,
    wait_for,
)

GET = head("GET /echo HTTP/1.1")


@pytest.fixture(scope="module", params=LOOPS)
def server(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(request.param) as served:
        yield served


@pytest.fixture
def served(server: Served, caplog: pytest.LogCaptureFixture) -> Iterator[Served]:
    server.forget()
    with caplog.at_level(logging.WARNING):
        yield server
    assert not caplog.records, "what a client does is logged"


def come_and_wait(served: Served, path: str, *more: bytes, version: str = "1.1") -> socket.socket:
    """A connection whose request is under way."""
    connection = served.connect()
    connection.sendall(post(path, b"{}", version=version) + b"".join(more))
    wait_for(lambda: served.desk.waiting == [path], "the request did not come")
    return connection


@pytest.mark.parametrize("path", ["/hold", "/stream"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_sends_no_more_gets_its_answer(served: Served, path: str, version: str) -> None:
    with come_and_wait(served, path, version=version) as connection:
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(0.3)  # probes are sent meanwhile
        early = b""
        with pytest.raises(TimeoutError):
            while piece := connection.recv(4096):
                early += piece
        connection.settimeout(20)
        served.release()
        answer = early + everything(connection)
    status, headers, body = split(answer)
    assert status == f"HTTP/{version} 200 OK" and "content-length" in headers or path == "/stream"
    if path == "/stream" and version == "1.1":
        size, _, rest = body.partition(b"\r\n")
        assert int(size, 16) == 2 and rest == b"do\r\n2\r\nne\r\n0\r\n\r\n"
    else:
        assert body == b"done"
    assert served.desk.gone == []


def test_requests_in_one_write_before_the_end_are_all_answered(served: Served) -> None:
    answer = served.say(GET + post("/echo", b"two") + GET, half_close=True)
    assert answer.count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize("path", ["/hold", "/stream"])
@pytest.mark.parametrize(
    "more",
    [b"", GET, GET * 3, GET + b"GET /half a he", b"garbage\r\n\r\n", post("/echo", bytes(200_000))],
    ids=["nothing", "a request", "requests", "half a request", "garbage", "a long body"],
)
def test_a_client_that_has_gone_is_noticed_whatever_it_sent_behind_its_request(
    served: Served, path: str, more: bytes
) -> None:
    come_and_wait(served, path, more).close()
    wait_for(lambda: served.desk.gone == [path], "the request of a client that has gone is still under way")
    assert served.desk.called == [path]


def test_a_client_that_stops_sending_and_goes_later_is_noticed(served: Served) -> None:
    with come_and_wait(served, "/hold") as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"H"  # it is there
    wait_for(lambda: served.desk.gone == ["/hold"], "the client has gone and is still served")


def test_a_client_that_resets_the_connection_is_noticed(served: Served) -> None:
    connection = come_and_wait(served, "/hold", GET)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    wait_for(lambda: served.desk.gone == ["/hold"], "the client has gone and is still served")


@pytest.mark.parametrize(
    "sent",
    [post("/echo", b"12345")[:-1], head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked") + chunked(b"12345")[:-2]],
    ids=["length", "chunks"],
)
def test_a_body_that_ends_early_is_refused(served: Served, sent: bytes) -> None:
    answer = served.say(sent, half_close=True)
    assert split(answer)[0] == "HTTP/1.1 400 Bad Request"
    assert "ended before it was complete" in error_of(answer)["message"]


@pytest.mark.parametrize("sent", [b"", b"GET /ec", GET[:-2]])
def test_a_client_that_goes_before_its_request_is_whole_gets_nothing(served: Served, sent: bytes) -> None:
    assert served.say(sent, half_close=True) == b""
    assert served.desk.called == []
