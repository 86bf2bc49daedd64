"""What holds of the handle to an engine's process, without a process: nothing waits for an engine that is gone."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from pagebrain import PageBrainConfig
from pagebrain.engine.trace import EngineStats
from pagebrain.outputs import OutputDelta
from pagebrain.server.link.handle import EngineDeadError
from pagebrain.server.link.messages import Ended, LiveUpdate, Paused, Stepped
from pagebrain.server.link.process import EngineProcess


class Listener:
    """Notes what it is told; the first step is too much for it."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_step(self, deltas: Sequence[OutputDelta], stats: EngineStats) -> None:
        self.told.append("step")
        raise KeyError("a mistake")

    def on_refused(self, request_id: str, message: str, is_mistake: bool) -> None:
        self.told.append("refused")

    def on_ended(self, request_id: str) -> None:
        self.told.append("ended")

    def on_live(self, update: dict[str, Any]) -> None:
        self.told.append("live")

    def on_dead(self, reason: str) -> None:
        self.told.append(reason)


class Started(EngineProcess):
    """As one that is ready, without its child."""

    def __init__(self) -> None:
        super().__init__(PageBrainConfig())
        self.listener = self._listener = Listener()
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._ready.set_result(None)  # type: ignore[arg-type]


def test_a_pause_fails_when_the_engine_is_stopped_and_after_it() -> None:
    async def scenario() -> None:
        handle = Started()
        waiting = handle.control("pause")
        await handle.stop()
        for answer in (waiting, handle.control("resume")):
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(answer, 5)

    asyncio.run(scenario())


def test_answers_to_pauses_come_in_their_order() -> None:
    async def scenario() -> None:
        handle = Started()
        answers = [handle.control("pause"), handle.control("resume")]
        handle._unread.append([Paused(True), Paused(False)])
        handle.poll()
        assert [await answer for answer in answers] == [True, False] and not handle.paused

    asyncio.run(scenario())


def test_a_listener_that_fails_is_told_of_the_end_and_of_nothing_after_it() -> None:
    async def scenario() -> None:
        handle = Started()
        pause = handle.control("pause")
        handle._unread.append([Stepped((), EngineStats()), Ended("r")])
        handle._unread.append([LiveUpdate({}), Stepped((), EngineStats())])
        handle.poll()
        assert handle.listener.told == ["step", "the server failed over one of its messages (KeyError)"]
        with pytest.raises(EngineDeadError, match="the engine has stopped: the server failed"):
            await pause

    asyncio.run(scenario())
