"""The live view over HTTP: its files, its feed, its controls."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, MutableMapping
from importlib import resources
from typing import Any

import httpx
import pytest

from pagebrain.server.live import hub as hub_module
from pagebrain.server.live.hub import MAX_VIEWERS, LiveHub
from pagebrain.server.live.routes import ASSETS, FeedResponse
from pagebrain.server.options import ServerOptions
from tests.server.support_live import FakeClient, Simulation, fake_app, serving

FOLDER = resources.files("pagebrain.server.live").joinpath("page")


@pytest.fixture(scope="module")
def client() -> FakeClient:
    return FakeClient(Simulation(num_blocks=48), steps_per_s=200)


@pytest.fixture(scope="module")
def address(client: FakeClient) -> Iterator[str]:
    with serving(fake_app(client, ServerOptions(live_control=True))) as address:
        yield address


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_the_page_and_its_files_come_with_their_types_and_a_strict_policy(address: str) -> None:
    for name, media_type in {"": "text/html", **{f"/{name}": kind for name, kind in ASSETS.items()}}.items():
        response = httpx.get(f"{address}/live{name}")
        assert response.status_code == 200 and response.headers["content-type"].split(";")[0] == media_type
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"


def test_a_browser_that_has_a_file_is_not_sent_it_again(address: str) -> None:
    first = httpx.get(f"{address}/live/main.js")
    tag = first.headers["etag"]
    again = httpx.get(f"{address}/live/main.js", headers={"If-None-Match": f'"other", W/{tag}'})
    assert again.status_code == 304 and not again.content and again.headers["etag"] == tag
    assert httpx.get(f"{address}/live/main.js", headers={"If-None-Match": '"other"'}).content == first.content
    assert httpx.get(f"{address}/live/model.js").headers["etag"] != tag


def test_nothing_but_the_listed_files_is_reachable(address: str) -> None:
    for path in (
        "live/../live.py",
        "live/%2e%2e/live.py",
        "live//etc/passwd",
        "live/uplot/README.md",
        "live/index.html",
        "live/main%2ejs",
        "live/%6dain.js",
        "live/main.js%00",
        "live/main.js%20",
        "live/uplot%2fLICENSE",
        "live/Main.js",
    ):
        response = httpx.get(f"{address}/{path}")
        assert response.status_code == 404, path
        assert "error" in response.json() or "detail" in response.json()


def test_every_file_of_the_page_is_listed() -> None:
    names = {path.name for path in FOLDER.iterdir() if path.is_file()}
    names |= {f"uplot/{path.name}" for path in FOLDER.joinpath("uplot").iterdir()}
    assert names == {*ASSETS, "index.html", "uplot/README.md"}


def test_the_page_holds_no_inline_script_or_style_and_no_foreign_address() -> None:
    text = FOLDER.joinpath("index.html").read_text()
    assert "<style" not in text and " style=" not in text and " onclick=" not in text
    for name in ("index.html", "live.css", *(name for name in ASSETS if name.endswith(".js") and "/" not in name)):
        assert "//cdn" not in (content := FOLDER.joinpath(name).read_text()) and "https://" not in content, name


def test_the_feed_says_hello_and_then_how_things_stand(address: str, client: FakeClient) -> None:
    with httpx.stream("GET", f"{address}/live/feed", timeout=10) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        feed = events(response)
        name, hello = next(feed)
        assert name == "hello" and hello["control"] is True and hello["paused"] is False
        assert (hello["num_blocks"], hello["block_size"], hello["max_num_seqs"]) == (48, 16, 16)
        assert (hello["max_model_len"], hello["max_num_batched_tokens"]) == (768, 96)
        seen: list[int] = []
        for name, update in feed:
            assert name == "update" and update["skipped"] == 0
            seen += [step["step"] for step in update["steps"]]
            held = {block for table in update["state"]["tables"].values() for block in table}
            assert len(held) == 48 - update["state"]["free_blocks"]
            if len(seen) > 60:
                break
        assert seen == list(range(seen[0], seen[0] + len(seen)))


def test_more_viewers_than_places_are_told_so(address: str) -> None:
    with contextlib.ExitStack() as stack, httpx.Client(timeout=10, limits=httpx.Limits()) as browser:
        until = time.monotonic() + 10
        watching: list[Iterator[str]] = []
        while len(watching) < MAX_VIEWERS:
            lines = stack.enter_context(browser.stream("GET", f"{address}/live/feed")).iter_lines()
            watching += [lines] if next(lines) == "event: hello" else []  # it has its place
            assert time.monotonic() < until, "those of the tests before still have theirs"
        with browser.stream("GET", f"{address}/live/feed") as refused:
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert "viewers" in json.loads(refused.read())["error"]["message"]


def test_a_viewer_that_goes_while_news_come_is_gone_all_the_same() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()

        def absorb_later(hub: LiveHub, num_turns: int) -> None:
            """At one of the turns of the loop in which the disconnect is acted on."""
            if num_turns:
                loop.call_soon(absorb_later, hub, num_turns - 1)
            else:
                hub._absorb({"steps": [], "skipped": 0, "time_s": 1.0})

        for number in range(60):
            client = FakeClient(Simulation(num_blocks=48))
            hub = LiveHub(client)
            goes = asyncio.Event()
            viewer = hub.join()

            def go(hub: LiveHub = hub, goes: asyncio.Event = goes, number: int = number) -> None:
                goes.set()
                absorb_later(hub, number % 6)

            async def receive(goes: asyncio.Event = goes) -> dict[str, Any]:
                await goes.wait()
                return {"type": "http.disconnect"}

            async def send(message: MutableMapping[str, Any]) -> None:
                pass

            loop.call_later(0.002, go)
            await asyncio.wait_for(FeedResponse(hub, viewer, b"")({"type": "http"}, receive, send), 5)
            assert hub.num_viewers == 0

    asyncio.run(test())


def test_a_viewer_that_goes_is_gone_at_once_even_if_it_never_read() -> None:
    async def test() -> None:
        client = FakeClient(Simulation(num_blocks=48))
        hub = LiveHub(client)
        goes = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await goes.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # it reads nothing

        watching = asyncio.create_task(FeedResponse(hub, hub.join(), b"event: hello\n\n")({"type": "http"}, receive, send))
        await asyncio.sleep(0.01)
        assert client.subscriptions and not watching.done()
        goes.set()
        await asyncio.wait_for(watching, 5)
        assert not client.subscriptions

    asyncio.run(test())


def test_pause_step_and_resume(address: str, client: FakeClient) -> None:
    def control(action: str) -> httpx.Response:
        return httpx.post(f"{address}/live/control", json={"action": action})

    assert control("pause").json() == {"paused": True}
    before = client.simulation.num_steps
    assert control("step").json() == {"paused": True}
    assert client.simulation.num_steps == before + 1
    assert control("resume").json() == {"paused": False}
    assert control("fly").status_code in (400, 422)
    assert client.actions[-3:] == ["pause", "step", "resume"]


def test_a_pause_by_somebody_who_does_not_watch_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "RESUME_AFTER_S", 0.1)
    client = FakeClient(Simulation())
    with serving(fake_app(client, ServerOptions(live_control=True))) as address:
        assert httpx.post(f"{address}/live/control", json={"action": "pause"}).json() == {"paused": True}
        until = time.monotonic() + 10
        while client.paused and time.monotonic() < until:
            time.sleep(0.01)
        assert not client.paused and client.actions == ["pause", "resume"]


def test_without_live_control_nobody_pauses_the_engine() -> None:
    client = FakeClient(Simulation())
    with serving(fake_app(client, ServerOptions())) as address:
        response = httpx.post(f"{address}/live/control", json={"action": "pause"})
        assert response.status_code == 403 and "--live-control" in response.json()["error"]["message"]
        with httpx.stream("GET", f"{address}/live/feed", timeout=10) as feed:
            assert next(events(feed))[1]["control"] is False
        assert not client.actions


def test_when_the_engine_dies_the_feed_says_why_and_ends() -> None:
    client = FakeClient(Simulation())
    with serving(fake_app(client, ServerOptions())) as address:
        with httpx.stream("GET", f"{address}/live/feed", timeout=10) as response:
            feed = events(response)
            assert next(feed)[0] == "hello" and next(feed)[0] == "update"
            client.die()
            last = list(feed)[-1]
        assert last == ("end", {"reason": "The engine has stopped: its process ended unexpectedly"})
        refused = httpx.get(f"{address}/live/feed")
        assert refused.status_code == 503 and "unexpectedly" in refused.json()["error"]["message"]
