"""Paths and methods as clients spell them: HEAD for GET, a slash too many, and names that only look like another."""

import httpx
import pytest

from pagebrain import LLM
from pagebrain.server.live.hub import MAX_VIEWERS
from tests.server.support_in_process import ServerThread

PATHS = [
    "/v1/models",
    "/v1/models/storyteller",
    "/health",
    "/version",
    "/metrics",
    "/openapi.json",
    "/live",
    "/live/main.js",
]
STREAM = "/live/feed"


def test_every_get_is_listed_here(api: ServerThread) -> None:
    described = {path for path, methods in api.get("/openapi.json").json()["paths"].items() if "get" in methods}
    assert described <= {path.replace("storyteller", "{model}") for path in PATHS}


@pytest.mark.parametrize("path", PATHS)
def test_head_gets_the_headers_of_get_and_no_body(path: str, api: ServerThread) -> None:
    got, asked = api.get(path), httpx.head(api.url + path)
    assert asked.status_code == got.status_code == 200 and asked.content == b"" != got.content
    assert asked.headers["content-type"] == got.headers["content-type"]
    if path != "/metrics":  # whose numbers change
        assert int(asked.headers["content-length"]) == len(got.content)


def test_head_of_a_stream_ends_and_leaves_no_viewer(api: ServerThread) -> None:
    with httpx.Client() as client:
        answers = [client.head(api.url + STREAM) for _ in range(MAX_VIEWERS + 1)]
    for answer in answers:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")


def test_head_of_a_post_is_refused_like_get(api: ServerThread) -> None:
    assert httpx.head(f"{api.url}/v1/completions").status_code == api.get("/v1/completions").status_code == 405


@pytest.mark.parametrize("path", ["//v1/completions", "/v1//completions", "/v1/completions/", "///v1///completions///"])
def test_a_slash_too_many_loses_no_body(path: str, api: ServerThread) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
    answer = api.post(path, body, follow_redirects=False)
    assert answer.status_code == 200
    assert answer.json()["choices"] == api.post("/v1/completions", body).json()["choices"]


@pytest.mark.parametrize("path", ["//v1/models", "/v1/models/", "/v1//models//storyteller/", "//health", "/health/"])
def test_a_slash_too_many_is_the_same_place(path: str, api: ServerThread) -> None:
    plain = path.replace("//", "/").rstrip("/")
    assert api.get(path).json() == api.get(plain).json()


@pytest.mark.parametrize("path", ["/live/", "/live//", "//live/"])
def test_the_page_is_shown_where_it_finds_its_files(path: str, api: ServerThread) -> None:
    answer = httpx.get(api.url + path, follow_redirects=True)
    assert "live/main.js" in answer.text and answer.url.path.lstrip("/") == "live"


@pytest.mark.parametrize("name", ["/data/models/gpt2", "models//gpt2/", "openai-community/gpt2"])
def test_a_model_whose_name_is_a_path_is_found(name: str, offline: LLM) -> None:
    with ServerThread(offline, served_model_name=name) as server:
        for path in (name, name.replace("/", "%2F")):
            answer = httpx.get(f"{server.url}/v1/models/{path}")
            assert answer.status_code == 200 and answer.json()["id"] == name, path
        assert server.get("/v1/models/gpt3").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        *("/health%0a", "/v1/models%0A", "/v1/models/storyteller%0a", "/v1/models/storyteller%00", "/metrics%0d"),
        *("/live%0a", "/live/main.js%0a", "/live/main.js%20", "/live/%6dain.js", "/live/uplot%2fLICENSE", "/live/feed%0a"),
    ],
)
def test_only_exact_names_are_served(path: str, api: ServerThread) -> None:
    answer = api.get(path)
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"
