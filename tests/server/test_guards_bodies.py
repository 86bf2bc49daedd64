"""Bodies: their size and their time are limited, whatever the headers say, and what follows a body is passed on."""

import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from pagebrain.server.guards.body_guard import MAX_BODIES
from tests.server.support_guards import GuardedApp, LiveApp, post_head, status_of, wait_for

LIMIT = 4096
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def live() -> Iterator[LiveApp]:
    with LiveApp(max_body_bytes=LIMIT, body_timeout_s=0.5) as app:
        yield app


def body_of(size: int) -> bytes:
    """A JSON string of ``size`` bytes."""
    return b'"' + b"x" * (size - 2) + b'"'


def post(app: GuardedApp, body: bytes | AsyncIterator[bytes], **headers: str) -> httpx.Response:
    return app.request("POST", "/v1/completions", content=body, headers=JSON | headers)


def test_the_longest_body_arrives_whole_and_one_byte_more_is_refused() -> None:
    app = GuardedApp(max_body_bytes=LIMIT)
    assert post(app, body_of(LIMIT)).json() == {"length": LIMIT}
    answer = post(app, body_of(LIMIT + 1))
    assert answer.status_code == 413 and str(LIMIT) in answer.json()["error"]["message"]
    assert app.bodies == [body_of(LIMIT)]


def test_a_body_in_pieces_is_joined_and_counted() -> None:
    app = GuardedApp(max_body_bytes=LIMIT)

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for byte in body_of(size):
            yield bytes([byte])

    assert post(app, pieces(LIMIT)).json() == {"length": LIMIT}
    assert post(app, pieces(LIMIT + 1)).status_code == 413
    assert app.bodies == [body_of(LIMIT)]


@pytest.mark.parametrize("length", ["-1", "+5", "1e3", "0x10", "1_0", "", "٣", "5, 5", "5.0"])
def test_a_length_that_is_no_number_is_refused(length: str) -> None:
    app = GuardedApp()
    answer = app.request(
        "POST",
        "/v1/completions",
        content=b"12345",
        headers=[(b"content-type", b"application/json"), (b"content-length", length.encode())],
    )
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_content_length"
    assert app.bodies == []


@pytest.mark.parametrize("second", [(b"content-length", b"6"), (b"transfer-encoding", b"chunked")])
def test_two_lengths_that_differ_are_refused(second: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"5"), second]
    answer = GuardedApp().request("POST", "/v1/completions", content=b"12345", headers=headers)
    assert answer.status_code == 400


def test_an_absurd_length_is_too_long_and_no_crash() -> None:
    assert post(GuardedApp(), b"{}", **{"Content-Length": "9" * 5000}).status_code == 413


def test_a_get_with_a_body_that_is_too_long_is_refused() -> None:
    assert GuardedApp(max_body_bytes=LIMIT).request("GET", "/v1/models", content=body_of(LIMIT + 1)).status_code == 413


def test_a_request_arrives_when_its_body_has() -> None:
    app = GuardedApp()
    last_s: list[float] = []

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            last_s.append(time.monotonic())
            yield b"[]"

    assert post(app, pieces()).status_code == 200
    assert last_s[-1] <= app.arrivals_s[-1] <= app.called_s[-1]


# Through a real server ------------------------------------------------------------------------------------------------


def test_a_length_over_the_limit_is_refused_before_the_body_is_sent(live: LiveApp) -> None:
    with live.connect() as connection:
        connection.sendall(post_head("Content-Length: 999999999"))
        answer = connection.recv(65536)
    assert status_of(answer) == 413
    assert b"connection: close" in answer.lower()


def test_a_client_that_sends_first_and_reads_then_gets_the_refusal(live: LiveApp) -> None:
    body = body_of(2_000_000)  # more than the buffers of the sockets hold
    answer = httpx.post(f"{live.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    raw = live.say(post_head(f"Content-Length: {len(body)}"), body)
    assert status_of(raw) == 413 and b'"body_too_large"' in raw


def test_chunks_are_counted_while_they_come(live: LiveApp) -> None:
    chunk = b"400\r\n" + b"x" * 0x400 + b"\r\n"
    before = len(live.bodies)
    with live.connect() as connection:
        connection.sendall(post_head("Transfer-Encoding: chunked"))
        for _ in range(5):  # the fifth is too much; the end never comes
            connection.sendall(chunk)
        assert status_of(connection.recv(65536)) == 413
    assert len(live.bodies) == before


def test_a_body_that_does_not_come_is_given_up(live: LiveApp) -> None:
    before = len(live.bodies)
    answer = live.say(post_head("Content-Length: 100"), b'{"prompt": ')
    assert status_of(answer) == 408
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    assert len(live.bodies) == before


def test_a_body_that_comes_byte_by_byte_is_given_up(live: LiveApp) -> None:
    with live.connect() as connection:
        connection.sendall(post_head("Content-Length: 4000"))
        connection.settimeout(0.02)
        answer, until = b"", time.monotonic() + 10
        while not answer and time.monotonic() < until:  # each byte comes in time; all of them do not
            connection.sendall(b"x")
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
    assert status_of(answer) == 408


def test_a_slow_body_within_the_time_limit_arrives(live: LiveApp) -> None:
    head = post_head("Content-Length: 4", "Connection: close")
    assert status_of(live.say(head, b"12", b"34", pause_s=0.05)) == 200
    assert live.bodies[-1] == b"1234"


def test_a_client_that_goes_in_mid_body_is_not_served_and_harms_nobody(live: LiveApp) -> None:
    before = len(live.bodies)
    with live.connect() as connection:
        connection.sendall(post_head("Content-Length: 100") + b"{")
    assert httpx.get(f"{live.url}/v1/models").status_code == 200
    time.sleep(0.05)
    assert len(live.bodies) == before + 1  # the GET's


def test_only_so_much_of_all_bodies_is_kept() -> None:
    with LiveApp(max_body_bytes=LIMIT) as live:
        answers: list[httpx.Response] = []

        def is_refused() -> bool:
            answers.append(httpx.post(f"{live.url}/v1/completions", json="x" * (MAX_BODIES + 1)))
            return answers[-1].status_code == 503

        for _ in range(2):  # what was answered or given up is no longer counted
            slow = [live.connect() for _ in range(MAX_BODIES)]
            for connection in slow:
                connection.sendall(post_head(f"Content-Length: {LIMIT}") + body_of(LIMIT)[1:])
            assert wait_for(is_refused), "when the others have come"
            assert answers[-1].json()["error"]["code"] == "server_busy" and int(answers[-1].headers["retry-after"]) > 0
            assert httpx.get(f"{live.url}/v1/models").status_code == 200
            for connection in slow[1:]:
                connection.sendall(b" ")
                assert status_of(connection.recv(65536)) == 200
                connection.close()
            slow[0].close()  # in mid-body
            assert wait_for(lambda: not is_refused())


def test_a_stream_under_way_keeps_no_room_from_other_bodies() -> None:
    with LiveApp(max_body_bytes=LIMIT) as live, contextlib.ExitStack() as stack:
        for _ in range(MAX_BODIES + 2):
            stream = httpx.stream("POST", f"{live.url}/stream", content=body_of(LIMIT), headers=JSON)
            assert stack.enter_context(stream).status_code == 200


def test_what_follows_a_body_is_another_request(live: LiveApp) -> None:
    more = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = live.say(post_head("Content-Length: 2") + b"{}" + more)
    assert answer.count(b"HTTP/1.1 200") == 2 and live.bodies[-2:] == [b"{}", b""]


def test_a_refused_request_does_not_let_its_body_pass_for_another_request(live: LiveApp) -> None:
    before = len(live.bodies)
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = live.say(post_head(f"Content-Length: {LIMIT + 1}") + hidden.ljust(LIMIT + 1, b" "))
    assert answer.count(b"HTTP/1.1") == 1 and status_of(answer) == 413
    assert len(live.bodies) == before


def test_a_stream_is_not_held_up_and_sees_its_client_go(live: LiveApp) -> None:
    gone = live.disconnects
    with httpx.stream("POST", f"{live.url}/stream", json={"stream": True}) as answer:
        events = (line for line in answer.iter_lines() if line)
        assert [next(events) for _ in range(40)] == [f"data: {number}" for number in range(40)]
        assert live.disconnects == gone  # it has a thousand to send, over five seconds
    assert wait_for(lambda: live.disconnects == gone + 1, 3.0)
    assert live.bodies[-1] == b'{"stream":true}'
