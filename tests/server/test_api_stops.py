"""A request's own facts: who may stop it, what is then said, whom it was for, and when it arrived."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pagebrain.engine.trace import EngineStats
from pagebrain.server.api.service import SECRET_HEADER
from pagebrain.server.link.streams import RequestStream
from tests.server.support_guards import wait_for
from tests.server.support_in_process import ServerThread

LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}
SECRET = "0123456789abcdef"


class Ended:
    """An observer that keeps the requests that ended."""

    def __init__(self) -> None:
        self.requests: list[RequestStream] = []

    def on_step(self, stats: EngineStats) -> None: ...
    def on_first_token(self, request: RequestStream, seconds: float) -> None: ...
    def on_tokens(self, num_tokens: int, gaps_s: list[float]) -> None: ...
    def on_finished(self, request: RequestStream, outcome: str) -> None:
        self.requests.append(request)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    """One that takes its time."""
    with ServerThread(log_requests=True) as server:
        server.client.handle.step_s = 0.01
        yield server


def _running(server: ServerThread) -> list[str]:
    def names() -> list[str]:
        return list(server.call(lambda: list(server.client._streams)))

    assert wait_for(names)
    return names()


def _stop(server: ServerThread, request_id: str, **headers: str) -> httpx.Response:
    return server.post("/live/stop", {"request_id": request_id}, headers=headers)


def test_only_who_knows_its_secret_stops_a_request(server: ServerThread) -> None:
    answers: list[httpx.Response] = []
    body = LONG | {"user": "ada"}
    asked = threading.Thread(
        target=lambda: answers.append(server.post("/v1/completions", body, headers={SECRET_HEADER: SECRET}))
    )
    asked.start()
    [name] = _running(server)
    assert _stop(server, name).status_code == 400
    for wrong in ("ada", SECRET[:-1], SECRET + "0", "é"):
        refused = httpx.post(
            f"{server.url}/live/stop", json={"request_id": name}, headers=[(SECRET_HEADER.encode(), wrong.encode("latin-1"))]
        )
        assert refused.status_code == 404
    assert _running(server) == [name]
    assert _stop(server, name, **{SECRET_HEADER: SECRET}).json() == {"stopped": name}
    asked.join(10)
    error = answers[0].json()["error"]
    assert answers[0].status_code == 503 and error["code"] == "request_stopped"
    assert "stopped" in error["message"] and "shut" not in error["message"]


def test_what_was_sent_without_a_secret_is_stopped_by_nobody(server: ServerThread) -> None:
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        [name] = _running(server)
        assert _stop(server, name, **{SECRET_HEADER: "None"}).status_code == 404
        assert _running(server) == [name]
    server.wait_until_idle()


@pytest.mark.parametrize("secret", ["", "x" * 129])
def test_a_secret_that_is_none_is_refused(secret: str, server: ServerThread) -> None:
    for path, body in (("/v1/completions", LONG), ("/generate", {"prompt": "x"}), ("/live/stop", {"request_id": "x"})):
        answer = server.post(path, body, headers={SECRET_HEADER: secret})
        assert answer.status_code == 400 and SECRET_HEADER in answer.json()["error"]["message"]


def test_the_log_has_the_user_and_not_the_secret(server: ServerThread, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        body = {"prompt": "Once", "max_tokens": 1, "user": "ada"}
        assert server.post("/v1/completions", body, headers={SECRET_HEADER: SECRET}).status_code == 200
    assert '"user": "ada"' in caplog.text and SECRET not in caplog.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["Once", "Twice"], "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}),
        ("/generate", {"prompt": "Once", "max_new_tokens": 1}),
    ],
)
def test_a_request_arrives_before_its_prompt_is_tokenized(
    path: str, body: dict[str, Any], api: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    began_s: list[float] = []
    encode = api.client.encode

    def watched(text: str, **settings: Any) -> list[int]:
        began_s.append(time.monotonic())
        return encode(text, **settings)

    monkeypatch.setattr(api.client, "encode", watched)
    ended = Ended()
    before_s = time.monotonic()
    api.call(lambda: api.client.observers.append(ended))
    try:
        assert api.post(path, body).status_code == 200
        api.wait_until_idle()
    finally:
        api.call(lambda: api.client.observers.remove(ended))
    assert ended.requests
    assert all(before_s <= request.arrival_s <= began_s[0] for request in ended.requests)
