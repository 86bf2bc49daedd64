"""Who may use the server: the API key, the content type that keeps strange pages out, CORS; and unexpected errors."""

import asyncio
import logging
from typing import Any

import httpx
import pytest

from tests.server.support_guards import ASSET, GuardedApp, LiveApp, status_of

KEY = "sk-näh-4711"
WITH_KEY = {"Authorization": f"Bearer {KEY}".encode()}
ORIGIN = "https://page.example"


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error object, after a look at its shape."""
    error: dict[str, Any] = answer.json()["error"]
    assert answer.headers["content-type"] == "application/json"
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


PROTECTED = [
    *(("GET", path) for path in ("/v1/models", "/metrics", "/live/feed", "/nowhere", "/docs", "/openapi.json", "/")),
    *(("POST", path) for path in ("/v1/completions", "/live/control", "/health", ASSET)),
]


@pytest.mark.parametrize("method, path", PROTECTED)
def test_without_the_key_nothing_is_served(method: str, path: str) -> None:
    app = GuardedApp(api_key=KEY)
    answer = app.request(method, path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert error_of(answer)["code"] == "invalid_api_key"
    assert app.bodies == []


@pytest.mark.parametrize("path", ["/health", "/health/", "http://localhost//health", "/live", ASSET])
def test_health_and_the_files_of_the_live_page_need_no_key(path: str) -> None:
    assert GuardedApp(api_key=KEY).request("GET", path).status_code == 200


def test_a_path_that_the_router_takes_for_a_protected_one_needs_the_key() -> None:
    app = GuardedApp(api_key=KEY)
    for path in ("/live/%66eed", "http://localhost//live/feed", "/live//feed/", "/v1//models", "/v1/models/"):
        assert app.request("GET", path, headers=WITH_KEY).status_code == 200, f"{path} is not routed: the test shows nothing"
        assert app.request("GET", path).status_code == 401, path


def test_a_path_with_a_control_character_is_nowhere() -> None:
    app = GuardedApp(api_key=KEY)
    for path in ("/live/feed%0A", "/health%0A", "/v1/models%0a", "/v1/models%00", f"{ASSET}%0a", "/%7f"):
        answer = app.request("GET", path, headers=WITH_KEY)
        assert answer.status_code == 404 and error_of(answer)["code"] == "not_found", path
        assert app.request("GET", path).status_code == 401, path
    assert app.bodies == []


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer {KEY}", f"Bearer  {KEY} "])
def test_the_key_lets_in(value: str) -> None:
    assert GuardedApp(api_key=KEY).request("GET", "/v1/models", headers={"Authorization": value.encode()}).status_code == 200


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer ÿ", f"Bearer{KEY}"],
)
def test_anything_but_the_key_does_not(value: str) -> None:
    answer = GuardedApp(api_key=KEY).request("GET", "/v1/models", headers={"Authorization": value.encode()})
    assert answer.status_code == 401 and KEY not in answer.text


def test_bytes_that_are_no_text_are_a_wrong_key() -> None:
    answer = GuardedApp(api_key=KEY).request("GET", "/v1/models", headers={"Authorization": b"Bearer \xff\xfe"})
    assert answer.status_code == 401


def test_a_websocket_is_no_way_around_the_key() -> None:
    sent: list[Any] = []

    async def connect() -> None:
        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/health", "headers": [], "query_string": b"", "root_path": ""}
        await GuardedApp(api_key=KEY).app(scope, receive, send)

    asyncio.run(connect())
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_without_a_key_in_the_options_everybody_is_let_in() -> None:
    assert GuardedApp().request("GET", "/v1/models").status_code == 200


# The server's name -----------------------------------------------------------------------------------------------------

NAMES = [
    "localhost",
    "LocalHost:8000",
    "localhost.",
    "app.localhost",
    "127.0.0.1:8000",
    "[::1]:8000",
    "10.1.2.3",
    "[fe80::1]",
]
STRANGE = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "notlocalhost",
    "",
    "[",
    "é",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_server_of_this_machine_is_called_by_an_address_or_a_local_name(name: str) -> None:
    assert GuardedApp().request("GET", "/v1/models", headers={"Host": name}).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_a_page_that_has_its_name_point_to_this_machine_is_refused(host: str) -> None:
    app = GuardedApp(host=host)
    for name in STRANGE:
        for method, path in (("POST", "/v1/completions"), ("GET", "/health"), ("GET", ASSET)):
            answer = app.request(method, path, headers={"Host": name.encode("latin-1")})
            assert answer.status_code == 403, name
            error = error_of(answer)
            assert (
                error["code"] == "host_not_allowed" and "--api-key" in error["message"] and "localhost" in error["message"]
            )
    assert app.bodies == []


def test_one_strange_name_among_others_is_refused() -> None:
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    assert GuardedApp().request("GET", "/health", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "options", [{"api_key": KEY}, {"host": "0.0.0.0"}, {"host": "10.1.2.3"}, {"cors_origins": ("*",)}], ids=str
)
def test_a_server_that_is_for_more_than_this_machine_is_called_as_you_like(options: dict[str, Any]) -> None:
    headers = {"Host": "models.example", "Authorization": WITH_KEY["Authorization"]}
    assert GuardedApp(**options).request("GET", "/v1/models", headers=headers).status_code == 200


def test_names_of_listed_origins_may_be_used_and_no_others() -> None:
    app = GuardedApp(cors_origins=("https://Page.example:8443", ORIGIN))
    assert app.request("GET", "/health", headers={"Host": "page.example:8000"}).status_code == 200
    assert app.request("GET", "/health", headers={"Host": "other.example"}).status_code == 403


# Content type ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["application/json", "application/json; charset=utf-8", "Application/JSON;charset=UTF-8"])
def test_json_is_let_in(value: str) -> None:
    answer = GuardedApp().request("POST", "/v1/completions", content=b"{}", headers={"Content-Type": value})
    assert answer.status_code == 200


SIMPLE = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "text/plain;application/json",
    None,
]


@pytest.mark.parametrize("value", SIMPLE)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_post_that_browsers_send_unasked_is_refused(value: str | None, chunked: bool) -> None:
    app = GuardedApp()

    async def pieces() -> Any:
        yield b"{}"

    headers = {} if value is None else {"Content-Type": value}
    answer = app.request("POST", "/v1/completions", content=pieces() if chunked else b"{}", headers=headers)
    assert answer.status_code == 415 and app.bodies == []
    assert error_of(answer)["code"] == "unsupported_media_type"


def test_a_post_without_a_body_needs_no_content_type() -> None:
    assert GuardedApp().request("POST", "/v1/completions").status_code == 200


# CORS -----------------------------------------------------------------------------------------------------------------

PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_a_listed_origin_passes_preflight_without_the_key() -> None:
    app = GuardedApp(api_key=KEY, cors_origins=(ORIGIN,))
    answer = app.request("OPTIONS", "/v1/completions", headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "Authorization" in answer.headers["access-control-allow-headers"]
    other = app.request("OPTIONS", "/v1/completions", headers=PREFLIGHT | {"Origin": "https://other.example"})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


def test_a_page_of_a_listed_origin_may_read_every_refusal() -> None:
    app = GuardedApp(api_key=KEY, cors_origins=(ORIGIN,), max_body_bytes=1024)
    requests: dict[int, dict[str, Any]] = {
        401: {"method": "POST", "path": "/v1/completions", "json": {}},
        413: {"method": "POST", "path": "/v1/completions", "json": "x" * 2000, "headers": WITH_KEY},
        415: {"method": "POST", "path": "/v1/completions", "content": b"{}", "headers": WITH_KEY},
        500: {"method": "GET", "path": "/fail", "headers": WITH_KEY},
    }
    for status, request in requests.items():
        answer = app.request(**request | {"headers": request.get("headers", {}) | {"Origin": ORIGIN}})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN, status


def test_a_star_lets_every_origin_in() -> None:
    answer = GuardedApp(cors_origins=("*",)).request("GET", "/v1/models", headers={"Origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == "*"


def test_no_origin_is_let_in_unless_listed() -> None:
    app = GuardedApp()
    assert "access-control-allow-origin" not in app.request("GET", "/v1/models", headers={"Origin": ORIGIN}).headers
    assert "access-control-allow-origin" not in app.request("OPTIONS", "/v1/completions", headers=PREFLIGHT).headers


# Unexpected errors ----------------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_a_500_that_quotes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), LiveApp() as app:
        raw = app.say(b"GET /fail HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert status_of(raw) == 500 and b'"internal_error"' in raw and app.quoted.encode() not in raw
    assert "RuntimeError" in caplog.text and app.quoted not in caplog.text
