"""Distributes the engine's live updates to the viewers.

The engine makes updates only for a subscriber. A :class:`LiveHub` subscribes with its first viewer and unsubscribes with its
last. A viewer gets the newest update when it is ready for one: a slow viewer skips updates and delays no other. An update is
encoded once for all viewers. A paused engine is resumed when no viewer is left.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Protocol

from pagebrain.config import PageBrainConfig
from pagebrain.errors import PageBrainError
from pagebrain.server.api.heavy import encode_json
from pagebrain.server.link.messages import ControlAction
from pagebrain.server.live.feed import INTERVAL_S, MAX_STEPS

logger = logging.getLogger(__name__)

MAX_VIEWERS = 32
"""Viewers at a time. Each costs the server a connection and at most a few hundred kilobytes a second."""

RESUME_AFTER_S = 10.0
"""Time without viewers after which a paused engine is resumed. A reloaded page reconnects sooner."""


class TooManyViewersError(PageBrainError):
    """There are :data:`MAX_VIEWERS` viewers already."""


class LiveEndedError(PageBrainError):
    """There will be no more updates. The message says why."""


class Subscription(Protocol):
    """Updates as they come, until closed."""

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]: ...
    def close(self) -> None: ...


class LiveSource(Protocol):
    """What the live view calls on :class:`~pagebrain.server.link.client.EngineClient`."""

    @property
    def config(self) -> PageBrainConfig: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def is_draining(self) -> bool: ...
    @property
    def paused(self) -> bool: ...
    @property
    def failure(self) -> str | None: ...
    def subscribe_live(self) -> Subscription: ...
    async def control(self, action: ControlAction) -> bool: ...
    def abort_request(self, request_id: str, secret: str) -> bool: ...


def encode_event(name: str, data: str) -> bytes:
    """A server-sent event; ``data`` has no line breaks."""
    return f"event: {name}\ndata: {data}\n\n".encode()


class Viewer:
    """One open page: what was sent to it, and when the next update may be sent."""

    def __init__(self, hub: "LiveHub", num_seen: int) -> None:
        self._hub = hub
        self._version = 0
        self._num_seen = num_seen
        self._due_s = 0.0
        self.news = asyncio.Event()

    async def next_update(self, timeout_s: float) -> bytes | None:
        """The newest update, as soon as there is one that this viewer has not seen; ``None`` after ``timeout_s``.

        Raises ``LiveEndedError`` if there will be no more updates.
        """
        if self._version == self._hub.version and self._hub.ended is None:
            self.news.clear()
            try:
                await asyncio.wait_for(self.news.wait(), timeout_s)
            except asyncio.TimeoutError:
                return None
        await asyncio.sleep(self._due_s - time.monotonic())
        if self._version == self._hub.version:
            raise LiveEndedError(self._hub.ended or "The live view has ended.")
        event = self._hub.event_since(self._num_seen)
        self._version, self._num_seen = self._hub.version, self._hub.num_steps
        self._due_s = time.monotonic() + INTERVAL_S
        return event


class LiveHub:
    """Collects updates while there are viewers.

    Attributes:
        version: number of updates collected.
        num_steps: number of steps in them, skipped steps included.
        ended: why there will be no more updates; ``None`` while more may come.
    """

    def __init__(self, source: LiveSource) -> None:
        self.version = 0
        self.num_steps = 0
        self.ended: str | None = None
        self._source = source
        self._viewers: set[Viewer] = set()
        self._subscription: Subscription | None = None
        self._collecting: asyncio.Task[None] | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._steps: deque[tuple[int, str]] = deque(maxlen=MAX_STEPS)
        self._newest: dict[str, Any] | None = None
        self._newest_text: str | None = None
        self._events: dict[int, bytes] = {}

    @property
    def num_viewers(self) -> int:
        """Number of viewers now."""
        return len(self._viewers)

    def join(self) -> Viewer:
        """Add a viewer. Its first update has the newest state and the latest steps.

        Raises ``TooManyViewersError``, or ``LiveEndedError`` if the engine has stopped or the server shuts down.
        """
        if not self._source.is_alive:
            raise LiveEndedError(f"The engine has stopped: {self._source.failure}")
        if self._source.is_draining:
            raise LiveEndedError("The server is shutting down.")
        if len(self._viewers) >= MAX_VIEWERS:
            raise TooManyViewersError(f"there are {MAX_VIEWERS} viewers already, and may be no more: try again later")
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        if self._collecting is None:
            self.ended = None
            self._subscription = self._source.subscribe_live()
            self._collecting = asyncio.create_task(self._collect(self._subscription))
        viewer = Viewer(self, self._steps[0][0] - 1 if self._steps else self.num_steps)
        if self._newest is None:
            viewer._version = self.version  # no update yet: wait for the first
        self._viewers.add(viewer)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Remove a viewer. Without viewers the engine makes no updates. May be called twice."""
        self._viewers.discard(viewer)
        if self._viewers or self._collecting is None:
            return
        self._collecting.cancel()
        self._collecting = None
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None
        self._newest = self._newest_text = None
        self._steps.clear()
        self._events.clear()
        self._resume_unless_watched()

    async def control(self, action: ControlAction) -> bool:
        """Pause, resume or single-step the engine. Returns whether it is paused now. Raises what the source raises."""
        was_paused = self._source.paused
        paused = await self._source.control(action)
        if paused and not was_paused:
            logger.info("paused by a viewer: requests wait until a viewer resumes the engine, or no viewer is left")
        elif was_paused and not paused:
            logger.info("resumed by a viewer")
        self._resume_unless_watched()  # the request may come from a client that is not a viewer
        return paused

    def _resume_unless_watched(self) -> None:
        if self._source.paused and not self._viewers and self._resuming is None:
            self._resuming = asyncio.create_task(self._resume_later())

    async def _resume_later(self) -> None:
        """Resume after a delay. The next viewer cancels this. Errors are ignored: the engine has stopped or will stop."""
        await asyncio.sleep(RESUME_AFTER_S)
        self._resuming = None
        with contextlib.suppress(PageBrainError):
            if self._source.paused:
                await self._source.control("resume")
                logger.info("resumed: no viewer is left")

    def event_since(self, num_seen: int) -> bytes:
        """An event with the newest state, and those steps after the first ``num_seen`` that are still kept."""
        if num_seen not in self._events:
            if self._newest_text is None:
                self._newest_text = encode_json(self._newest)[1:]  # without the opening brace
            steps = [text for number, text in self._steps if number > num_seen]
            skipped = self.num_steps - num_seen - len(steps)
            data = f'{{"steps":[{",".join(steps)}],"skipped":{skipped},{self._newest_text}'
            self._events[num_seen] = encode_event("update", data)
        return self._events[num_seen]

    async def _collect(self, subscription: Subscription) -> None:
        """Collect updates until the engine stops or the task is cancelled."""
        async for update in subscription:
            self._absorb(update)
        if self._source.failure is not None:
            self.ended = f"The engine has stopped: {self._source.failure}"
        else:
            self.ended = "The server is shutting down."
        self._wake()

    def _absorb(self, update: dict[str, Any]) -> None:
        self.num_steps += update["skipped"]
        for step in update["steps"]:
            self.num_steps += 1
            self._steps.append((self.num_steps, encode_json(step)))
        self._newest = {name: value for name, value in update.items() if name not in ("steps", "skipped")}
        self._newest_text = None
        self._events.clear()
        self.version += 1
        self._wake()

    def _wake(self) -> None:
        for viewer in self._viewers:
            viewer.news.set()
