"""Many viewers of one engine: who gets which updates, and that no viewer costs another one."""

import asyncio
import json
import logging
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from pagebrain.server.live import hub as hub_module
from pagebrain.server.live.feed import INTERVAL_S, MAX_STEPS
from pagebrain.server.live.hub import MAX_VIEWERS, LiveEndedError, LiveHub, TooManyViewersError, Viewer
from tests.server.support_live import FakeClient, Simulation


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


def new_client() -> FakeClient:
    """Steps only when told to."""
    return FakeClient(Simulation(num_blocks=48))


async def next_update(viewer: Viewer) -> dict[str, Any]:
    event = await viewer.next_update(5.0)
    assert event is not None
    name, data = event.decode().removesuffix("\n\n").split("\n")
    assert name == "event: update"
    update = json.loads(data.removeprefix("data: "))
    assert isinstance(update, dict)
    return update


async def step(client: FakeClient, count: int) -> None:
    for _ in range(count):
        await client.step()
    await asyncio.sleep(0)


def numbers(update: dict[str, Any]) -> list[int]:
    return [step["step"] for step in update["steps"]]


def test_the_engine_is_watched_once_and_only_while_somebody_watches() -> None:
    async def test() -> None:
        client = new_client()
        hub = LiveHub(client)
        assert not client.subscriptions
        viewers = [hub.join() for _ in range(3)]
        assert len(client.subscriptions) == 1
        hub.leave(viewers[0])
        hub.leave(viewers[1])
        assert len(client.subscriptions) == 1
        hub.leave(viewers[2])
        hub.leave(viewers[2])
        assert not client.subscriptions
        again = hub.join()
        assert len(client.subscriptions) == 1
        await step(client, 2)
        assert (await next_update(again))["state"] == client.simulation.state()
        hub.leave(again)

    run(test())


def test_a_viewer_gets_every_step_and_the_newest_state() -> None:
    async def test() -> None:
        client = new_client()
        hub = LiveHub(client)
        viewer = hub.join()
        seen: list[int] = []
        for count in (1, 7, 20):
            await step(client, count)
            update = await next_update(viewer)
            seen += numbers(update)
            assert update["skipped"] == 0
            assert update["state"] == client.simulation.state() and update["totals"] == client.simulation.totals()
        assert seen == list(range(28))
        assert client.simulation.num_preemptions > 0
        hub.leave(viewer)

    run(test())


def test_updates_come_ten_a_second_at_most_however_fast_the_engine_is() -> None:
    async def test() -> None:
        client = new_client()
        hub = LiveHub(client)
        viewer = hub.join()
        times: list[float] = []
        stop = time.monotonic() + 6 * INTERVAL_S
        stepping = asyncio.create_task(steps_until(client, stop))
        while time.monotonic() < stop:
            await next_update(viewer)
            times.append(time.monotonic())
        await stepping
        assert client.simulation.num_steps > 2 * len(times)  # it was much faster than that
        assert len(times) > 2
        assert all(later - earlier > 0.95 * INTERVAL_S for earlier, later in zip(times, times[1:]))
        hub.leave(viewer)

    async def steps_until(client: FakeClient, stop: float) -> None:
        while time.monotonic() < stop:
            await client.step()
            await asyncio.sleep(0.002)

    run(test())


def test_a_slow_viewer_skips_updates_and_holds_up_nobody() -> None:
    async def test() -> None:
        client = new_client()
        hub = LiveHub(client)
        quick, slow = hub.join(), hub.join()
        first = await next_update(slow)
        quick_steps: list[int] = []
        for _ in range(3):
            await step(client, 50)
            update = await next_update(quick)
            quick_steps += numbers(update)
        assert quick_steps == list(range(150))
        late = await next_update(slow)
        assert numbers(first) == [] and numbers(late) == list(range(150 - MAX_STEPS, 150))
        assert late["skipped"] == 150 - MAX_STEPS
        assert late["state"] == client.simulation.state()
        assert await slow.next_update(0.01) is None  # what it missed is gone for good: nothing piles up
        hub.leave(quick)
        hub.leave(slow)

    run(test())


def test_steps_that_the_engine_left_out_are_counted() -> None:
    async def test() -> None:
        client = new_client()
        hub = LiveHub(client)
        viewer = hub.join()
        await next_update(viewer)
        told = client.simulation.step
        client.add_request()
        [subscription] = client.subscriptions
        subscription.updates.put_nowait(client.update([told() or {}]) | {"skipped": 12})
        update = await next_update(viewer)
        assert update["skipped"] == 12 and numbers(update) == [0]
        hub.leave(viewer)

    run(test())


def test_an_update_is_encoded_once_for_all() -> None:
    async def test() -> None:
        client = new_client()
        hub = LiveHub(client)
        viewers = [hub.join() for _ in range(5)]
        await step(client, 3)
        events = [await viewer.next_update(5.0) for viewer in viewers]
        assert events[0] is not None and all(event is events[0] for event in events)
        for viewer in viewers:
            hub.leave(viewer)

    run(test())


def test_there_are_only_so_many_places_and_each_is_free_again_at_once() -> None:
    async def test() -> None:
        hub = LiveHub(new_client())
        viewers = [hub.join() for _ in range(MAX_VIEWERS)]
        with pytest.raises(TooManyViewersError, match=str(MAX_VIEWERS)):
            hub.join()
        hub.leave(viewers.pop())
        viewers.append(hub.join())
        for viewer in viewers:
            hub.leave(viewer)
        assert hub.num_viewers == 0

    run(test())


def test_a_late_viewer_sees_the_latest_steps_at_once() -> None:
    async def test() -> None:
        client = new_client()
        hub = LiveHub(client)
        early = hub.join()
        await step(client, 30)
        await next_update(early)
        late = hub.join()
        update = await next_update(late)
        assert numbers(update) == list(range(30)) and update["state"] == client.simulation.state()
        hub.leave(early)
        hub.leave(late)

    run(test())


def test_when_the_engine_dies_the_viewers_learn_why() -> None:
    async def test() -> None:
        client = new_client()
        hub = LiveHub(client)
        viewer = hub.join()
        await next_update(viewer)
        client.die()
        with pytest.raises(LiveEndedError, match="its process ended unexpectedly"):
            await viewer.next_update(5.0)
        hub.leave(viewer)
        with pytest.raises(LiveEndedError, match="its process ended unexpectedly"):
            hub.join()

    run(test())


@pytest.mark.parametrize("who", ["a viewer", "a client that does not watch"])
def test_a_pause_that_nobody_watches_ends_and_both_are_logged(
    who: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub_module, "RESUME_AFTER_S", 0.1)

    async def test() -> None:
        client = new_client()
        hub = LiveHub(client)
        viewers = [hub.join(), hub.join()] if who == "a viewer" else []
        assert await hub.control("pause") and await hub.control("step")
        for viewer in viewers[1:]:
            hub.leave(viewer)
        await asyncio.sleep(0.3 if viewers else 0)
        assert client.paused, "one is left"
        for viewer in viewers[:1]:
            hub.leave(viewer)
        await asyncio.sleep(0.3)
        assert not client.paused and client.actions == ["pause", "step", "resume"]

    with caplog.at_level(logging.INFO):
        run(test())
    assert [record.message.partition(":")[0] for record in caplog.records if record.name == hub_module.__name__] == [
        "paused by a viewer",
        "resumed",
    ]


def test_a_viewer_who_comes_back_soon_finds_the_pause_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "RESUME_AFTER_S", 0.2)

    async def test() -> None:
        client = new_client()
        hub = LiveHub(client)
        viewer = hub.join()
        await hub.control("pause")
        for _ in range(3):  # each time there is as much time to come back
            hub.leave(viewer)
            await asyncio.sleep(0.12)
            viewer = hub.join()
        await asyncio.sleep(0.3)
        assert client.paused and client.actions == ["pause"]
        assert not await hub.control("resume")
        hub.leave(viewer)
        await asyncio.sleep(0.3)
        assert client.actions == ["pause", "resume"]

    run(test())
