"""A stream gives its reader everything that came, once, and bounds what piles up for one who does not read."""

import asyncio
from typing import Any

import pytest

from pagebrain.errors import InvalidRequestError
from pagebrain.outputs import OutputDelta
from pagebrain.sampling_params import SamplingParams
from pagebrain.server.link.handle import EngineDeadError
from pagebrain.server.link.streams import (
    MAX_PENDING_STEPS,
    MAX_PENDING_TOKENS,
    LiveSubscription,
    RequestStream,
    SlowReaderError,
)


def delta(index: int, text: str, token_id: int, reason: Any = None) -> OutputDelta:
    return OutputDelta("r", index, text, (token_id,), finish_reason=reason)


def stream_of(n: int = 1, closed: list[RequestStream] | None = None) -> RequestStream:
    return RequestStream("r", (1, 2), SamplingParams(n=n), on_close=(closed if closed is not None else []).append)


def test_what_came_meanwhile_is_read_in_one_piece_for_each_sample() -> None:
    async def scenario() -> None:
        stream = stream_of(n=2)
        stream.put(delta(1, "x", 7), 1.0)
        stream.put(delta(0, "a", 5), 1.0)
        stream.put(delta(0, "b", 6, "stop"), 2.0)
        first, second = await stream.read()
        assert (first.index, first.text, first.token_ids, first.finish_reason) == (0, "ab", (5, 6), "stop")
        assert (second.index, second.text, second.token_ids, second.finish_reason) == (1, "x", (7,), None)
        stream.put(delta(1, "y", 8, "length"), 3.0)
        assert [d.text for d in await stream.read()] == ["y"]
        assert await stream.read() == []

    asyncio.run(scenario())


def test_a_reader_that_waits_is_woken() -> None:
    async def scenario() -> None:
        stream = stream_of()
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        assert not reading.done()
        stream.put(delta(0, "a", 5), 1.0)
        assert [d.text for d in await reading] == ["a"]

    asyncio.run(scenario())


def test_gaps_are_between_tokens_of_one_sample() -> None:
    stream = stream_of(n=2)
    assert stream.put(delta(0, "a", 5), 1.0) is None
    assert stream.put(delta(1, "b", 5), 4.0) is None
    assert stream.put(delta(0, "c", 5), 6.0) == 5.0


def test_a_stream_that_nobody_reads_breaks_at_the_bound() -> None:
    async def scenario() -> None:
        stream = stream_of()
        for number in range(MAX_PENDING_TOKENS):
            stream.put(delta(0, "a", number), 1.0)
        assert not stream.is_broken
        stream.put(delta(0, "a", 0), 1.0)
        assert stream.is_broken
        with pytest.raises(SlowReaderError, match="4097 tokens were waiting"):
            await stream.read()

    asyncio.run(scenario())


def test_what_came_before_an_error_can_still_be_read() -> None:
    async def scenario() -> None:
        stream = stream_of()
        stream.put(delta(0, "a", 5), 1.0)
        stream.fail(EngineDeadError("gone"))
        assert [d.text for d in await stream.read()] == ["a"]
        for _ in range(2):
            with pytest.raises(EngineDeadError):
                await stream.read()

    asyncio.run(scenario())


def test_an_error_wakes_who_waits_and_ends_read_all() -> None:
    async def scenario() -> None:
        stream = stream_of()
        reading = asyncio.ensure_future(stream.read_all())
        await asyncio.sleep(0)
        stream.put(delta(0, "a", 5), 1.0)
        await asyncio.sleep(0)
        stream.fail(InvalidRequestError("no"))
        with pytest.raises(InvalidRequestError):
            await reading

    asyncio.run(scenario())


def test_aborting_ends_the_samples_that_have_not_ended() -> None:
    async def scenario() -> None:
        stream = stream_of(n=2)
        stream.put(delta(0, "a", 5, "stop"), 1.0)
        stream.put(delta(1, "b", 6), 1.0)
        stream.abort()
        assert [(d.text, d.finish_reason) for d in await stream.read_all()] == [("a", "stop"), ("b", "abort")]

    asyncio.run(scenario())


def test_closing_tells_the_owner() -> None:
    closed: list[RequestStream] = []
    stream = stream_of(closed=closed)
    stream.close()
    assert closed == [stream]


def update(*steps: int, state: str = "") -> dict[str, Any]:
    return {"steps": list(steps), "skipped": 0, "state": state}


def test_a_slow_viewer_gets_the_newest_state_and_all_steps() -> None:
    async def scenario() -> None:
        subscription = LiveSubscription(on_close=lambda _: None)
        subscription.put(update(1, 2, state="old"))
        subscription.put(update(3, state="new"))
        subscription.end()
        assert [u async for u in subscription] == [{"steps": [1, 2, 3], "skipped": 0, "state": "new"}]

    asyncio.run(scenario())


def test_what_piles_up_for_a_viewer_is_bounded_and_counted() -> None:
    async def scenario() -> None:
        subscription = LiveSubscription(on_close=lambda _: None)
        for step in range(MAX_PENDING_STEPS + 7):
            subscription.put(update(step))
        subscription.end()
        (merged,) = [u async for u in subscription]
        assert len(merged["steps"]) == MAX_PENDING_STEPS and merged["skipped"] == 7
        assert merged["steps"][-1] == MAX_PENDING_STEPS + 6

    asyncio.run(scenario())


def test_closing_a_subscription_twice_tells_once() -> None:
    closed: list[LiveSubscription] = []
    subscription = LiveSubscription(on_close=closed.append)
    subscription.close()
    subscription.close()
    assert closed == [subscription]
