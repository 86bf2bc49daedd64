"""The guards stand before every route of the real application, whichever it gains."""

import asyncio

import httpx
import pytest

from pagebrain.config import PageBrainConfig
from pagebrain.server.api.app import create_app
from pagebrain.server.link.client import EngineClient
from pagebrain.server.link.process import EngineProcess
from pagebrain.server.live.routes import ASSETS
from pagebrain.server.options import ServerOptions

OPEN = {"/health", "/live"}
OPTIONS = ServerOptions(api_key="sk-1", max_body_bytes=2048)
APP = create_app(
    EngineClient(EngineProcess(PageBrainConfig()), OPTIONS), OPTIONS
)  # not started: nothing here may reach the engine

HIDDEN = [("GET", "/live/feed"), ("POST", "/live/control"), ("GET", "/live/nothing.js"), ("GET", "/openapi.json")]
"""Routes that the API's own description leaves out."""


def routes() -> list[tuple[str, str]]:
    """Every method and path."""
    described = APP.openapi()["paths"]
    return [(method.upper(), path) for path, methods in described.items() for method in methods] + HIDDEN


def request(method: str, path: str, **settings: object) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(APP, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **settings)  # type: ignore[arg-type]

    return asyncio.run(send())


def test_the_routes_are_found() -> None:
    assert {("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/metrics")} <= set(routes())
    assert len(set(routes())) == len(routes()) > 10


@pytest.mark.parametrize("method, path", [route for route in routes() if route[1] not in OPEN])
def test_no_route_answers_without_the_key(method: str, path: str) -> None:
    assert request(method, path).status_code == 401


@pytest.mark.parametrize("path", sorted(OPEN | {f"/live/{name}" for name in ASSETS}))
def test_what_is_open_answers_without_the_key(path: str) -> None:
    assert request("GET", path).status_code == 200


@pytest.mark.parametrize("path", [path for method, path in routes() if method == "POST"])
def test_every_post_is_limited_in_size_and_kind(path: str) -> None:
    key = {"Authorization": "Bearer sk-1"}
    assert request("POST", path, headers=key, json="x" * 3000).status_code == 413
    assert request("POST", path, headers=key, data={"prompt": "x"}).status_code == 415
