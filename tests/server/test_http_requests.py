"""Requests as clients really send them, and what is no request: offers of other protocols, old versions, limits, garbage."""

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from pagebrain.server.guards.connections import MAX_PIPELINED
from pagebrain.server.guards.request_parser import MAX_HEAD_BYTES, MAX_HEADER_BYTES, MAX_HEADERS, MAX_TARGET_BYTES
from tests.server.support_connections import (
    LOOPS,
    Served,
    chunked,
    error_of,
    everything,
    head,
    post,
    read_until,
    serving,
    split,
    wait_for,
)

CLOSE = "Connection: close"
BODY = b'{"prompt": "Once upon a time"}'


@pytest.fixture(scope="module", params=LOOPS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(request.param) as served:
        yield served


def seen(answer: bytes) -> dict[str, Any]:
    """What the application saw, by its answer."""
    status, _, body = split(answer)
    assert status.endswith("200 OK"), answer
    saw: dict[str, Any] = json.loads(body)
    return saw


# Offers of another protocol -------------------------------------------------------------------------------------------

H2C = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"]
"""What Java's HttpClient sends with its first request."""

OFFERS = [
    H2C,
    ["connection: upgrade", "UPGRADE: WebSocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZQ=="],
    ["Upgrade: TLS/1.0, h2c", "Connection: keep-alive", "Connection: UPGRADE"],
]


@pytest.mark.parametrize("offer", OFFERS, ids=["h2c", "websocket", "tls"])
@pytest.mark.parametrize("way", ["length", "chunks", "byte by byte", "no body"])
def test_an_offer_of_another_protocol_is_ignored(served: Served, offer: list[str], way: str) -> None:
    with served.connect() as connection:
        if way == "no body":
            sent = [head("GET /echo HTTP/1.1", *offer)]
        elif way == "chunks":
            sent = [head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked", *offer), chunked(BODY[:7], BODY[7:])]
        else:
            sent = [post("/echo", BODY, *offer)]
        if way == "byte by byte":
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent = [bytes([byte]) for byte in sent[0]]
        for piece in sent:
            connection.sendall(piece)
        saw = seen(read_until(connection, b'"}'))
        assert saw["body"] == ("" if way == "no body" else BODY.decode())
        assert "upgrade" not in saw["headers"] and "host" in saw["headers"]
        connection.sendall(post("/echo", b"again", *offer, CLOSE))  # the connection is as good as before
        assert seen(everything(connection))["body"] == "again"


def test_an_offer_and_the_question_whether_to_go_on_are_both_heard(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(head("POST /echo HTTP/1.1", "Content-Length: 4", "Expect: 100-Continue", *H2C))
        assert read_until(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"body")
        assert seen(read_until(connection, b'"}'))["body"] == "body"


def test_offers_in_one_write_are_answered_one_by_one(served: Served) -> None:
    answer = served.say(post("/echo", b"one", *H2C) + post("/echo", b"two", *H2C) + post("/echo", b"three", CLOSE))
    assert [answer.find(b'"body": "%b"' % word) > 0 for word in (b"one", b"two", b"three")] == [True] * 3


# Versions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, body", [("/echo", None), ("/stream", b"done")])
@pytest.mark.parametrize("keep_alive", [False, True])
def test_a_client_of_http_1_0_gets_an_answer_of_its_version(path: str, body: bytes | None, keep_alive: bool) -> None:
    with serving("uvloop") as served, served.connect() as connection:
        served.release()
        connection.sendall(post(path, BODY, *["Connection: keep-alive"] * keep_alive, version="1.0"))
        stays = keep_alive and path == "/echo"
        answer = read_until(connection, b'"}') if stays else everything(connection)
        status, headers, got = split(answer)
        assert status == "HTTP/1.0 200 OK" and "transfer-encoding" not in headers
        assert headers["connection"] == ("keep-alive" if stays else "close")
        assert body is None or got == body
        if stays:
            connection.sendall(post(path, b"again", version="1.0"))
            assert seen(everything(connection))["body"] == "again"


def test_a_client_of_http_1_0_is_not_asked_to_go_on(served: Served) -> None:
    assert served.say(post("/echo", b"body", "Expect: 100-continue", version="1.0")).startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize(
    "sent",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        head("GET /echo HTTP/2.0"),
        head("GET /echo HTTP/3.0"),
        head("GET /echo HTTP/1.7"),
        b"GET /echo\r\n\r\n",
    ],
)
def test_another_version_of_http_is_refused_by_name(served: Served, sent: bytes) -> None:
    answer = served.say(sent)
    assert split(answer)[0].startswith("HTTP/1.1 505 ")
    assert error_of(answer)["code"] == "http_version_not_supported"


# Limits ---------------------------------------------------------------------------------------------------------------

ENDLESS = [
    ("header lines", head("GET /echo HTTP/1.1")[:-2], b"X-Name: value\r\n", 431),
    ("a header's value", head("GET /echo HTTP/1.1")[:-2] + b"X-Name: ", b"v" * 900, 431),
    ("a header's name", head("GET /echo HTTP/1.1")[:-2], b"N" * 900, 431),
    ("a path", b"GET /", b"p" * 900, 414),
    ("a query", b"GET /echo?", b"q=1&" * 200, 414),
    ("spaces before the path", b"GET ", b" " * 900, 431),
    ("empty lines", b"", b"\r\n" * 500, 431),
    ("header lines behind an offer", head("GET /echo HTTP/1.1", *H2C)[:-2], b"X-Name: value\r\n", 431),
    ("trailers", head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked") + b"1\r\n \r\n0\r\n", b"X-Name: value\r\n", 431),
    ("a trailer", head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked") + b"1\r\n \r\n0\r\nX: ", b"v" * 900, 431),
    ("a chunk's extension", head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked") + b"1;x=", b"e" * 900, 431),
    ("a chunk's zeros", head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked"), b"0" * 900, 431),
]


@pytest.mark.parametrize("start, more, status", [case[1:] for case in ENDLESS], ids=[case[0] for case in ENDLESS])
def test_what_has_no_end_is_refused_while_it_comes(served: Served, start: bytes, more: bytes, status: int) -> None:
    num_called = len(served.desk.called)
    with served.connect() as connection:
        connection.sendall(start)
        for _ in range(100):  # 90,000 bytes and more; no end
            connection.sendall(more * (1 if len(more) > 500 else 60))
        answer = everything(connection)
    assert split(answer)[0].startswith(f"HTTP/1.1 {status} ")
    assert error_of(answer)["code"] == ("path_too_long" if status == 414 else "headers_too_large")
    assert set(served.desk.called[num_called:]) <= {"/echo"}  # of which the body has not ended


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("what", ["header lines", "a header line", "all header lines", "the path"])
def test_up_to_the_limits_a_request_is_served(served: Served, what: str, over: int) -> None:
    path, headers = "/echo", [CLOSE]
    if what == "header lines":
        headers += [f"X-{number}: value" for number in range(MAX_HEADERS - 2 + over)]
    elif what == "a header line":
        headers.append("X: " + "v" * (MAX_HEADER_BYTES - 5 + over))
    elif what == "all header lines":
        others = len("Host: localhost\r\n" + CLOSE + "\r\n")
        sizes = [16_000] * 4 + [MAX_HEAD_BYTES - 64_000 - others + over]
        headers += ["X: " + "v" * (size - 5) for size in sizes]
    else:
        path += "?" + "q" * (MAX_TARGET_BYTES - 6 + over)
    answer = served.say(head(f"GET {path} HTTP/1.1", *headers))
    assert split(answer)[0].split()[1] == ("200" if not over else "414" if what == "the path" else "431")


def test_a_trailer_does_not_pass_for_a_header(served: Served) -> None:
    trailers = b"0\r\nAuthorization: Bearer key\r\n\r\n"
    sent = head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked", CLOSE)
    saw = seen(served.say(post("/echo") + sent + b"2\r\n{}\r\n" + trailers).partition(b'"}')[2])
    assert saw["body"] == "{}" and "authorization" not in saw["headers"]


def test_only_so_many_requests_wait_on_one_connection() -> None:
    with serving("uvloop") as served, served.connect() as connection:
        connection.sendall(post("/hold") + head("GET /echo HTTP/1.1") * (MAX_PIPELINED + 5))
        served.release()
        answer = everything(connection)
        assert answer.count(b"HTTP/1.1 200 OK") == 1 + MAX_PIPELINED and answer.count(b"HTTP/1.1 429") == 1
        assert error_of(answer[answer.index(b"HTTP/1.1 429") :])["code"] == "too_many_pipelined_requests"
        assert served.desk.called == ["/hold"] + ["/echo"] * MAX_PIPELINED


# Garbage --------------------------------------------------------------------------------------------------------------

GARBAGE = [
    b"hello\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
    b"GET /\xff HTTP/1.1\r\n\r\n",
    b"GET nowhere HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n",
    b"GET / HTTP/1.1\r\nA: \0\r\n\r\n",
    head("POST /echo HTTP/1.1", "Content-Length: x"),
    head("POST /echo HTTP/1.1", "Content-Length: 2", "Transfer-Encoding: chunked") + b"{}",
    head("POST /echo HTTP/1.1", "Content-Length: 2", "Content-Length: 3") + b"{}",
    head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked") + b"2\r\n{}\r\nzz\r\n",
]


@pytest.mark.parametrize("sent", GARBAGE)
def test_what_is_no_request_is_refused_in_the_apis_shape_and_logged_nowhere(
    served: Served, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        answer = served.say(sent)
    assert split(answer)[0] == "HTTP/1.1 400 Bad Request" and error_of(answer)["code"] == "invalid_http"
    assert not caplog.records


def test_connect_is_refused(served: Served) -> None:
    answer = served.say(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")
    assert split(answer)[0] == "HTTP/1.1 405 Method Not Allowed" and error_of(answer)["code"] == "method_not_allowed"


def test_a_bad_request_waits_for_the_answers_before_it(served: Served) -> None:
    served.forget()
    with served.connect() as connection:
        connection.sendall(post("/hold") + post("/echo", b"second") + b"garbage\r\n\r\n")
        wait_for(lambda: served.desk.waiting == ["/hold"], "the first request did not come")
        served.release()
        answer = everything(connection)
    first, second, third = answer.index(b"done"), answer.index(b'"second"'), answer.index(b"HTTP/1.1 400 ")
    assert first < second < third and error_of(answer[third:])["code"] == "invalid_http"


def test_what_follows_a_last_request_is_ignored(served: Served) -> None:
    answer = served.say(post("/echo", b"last", CLOSE) + b"garbage\r\n\r\n")
    assert answer.count(b"HTTP/1.1") == 1 and seen(answer)["body"] == "last"


def test_a_target_with_a_scheme_or_a_star_is_read(served: Served) -> None:
    assert seen(served.say(head("GET http://localhost:1/echo?x HTTP/1.1", CLOSE)))["path"] == "/echo"
    assert seen(served.say(head("GET http://localhost HTTP/1.1", CLOSE)))["path"] == "/"
    assert seen(served.say(head("OPTIONS * HTTP/1.1", CLOSE)))["path"] == "*"


def test_a_head_is_answered_without_a_body(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(head("HEAD /echo HTTP/1.1"))
        answer = read_until(connection, b"\r\n\r\n")
        assert int(split(answer)[1]["content-length"]) > 0 and answer.endswith(b"\r\n\r\n")
        connection.sendall(head("GET /echo HTTP/1.1", CLOSE))
        assert everything(connection).startswith(b"HTTP/1.1 200")


def test_an_answer_before_the_body_does_not_make_the_body_a_request(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(head("POST /early HTTP/1.1", "Content-Length: 20"))
        read_until(connection, b"early")
        connection.sendall(b"GET /no HTTP/1.1\r\n\r\n" + head("GET /echo HTTP/1.1", CLOSE))
        assert seen(everything(connection))["path"] == "/echo"


def test_an_answer_that_is_left_is_cut_so_that_the_client_sees_it(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    assert split(served.say(head("GET /half HTTP/1.1")))[2] == b""
    assert "returned before its answer was complete" in caplog.text  # the application's fault, not the client's
