"""One stream of the engine's live updates in, any number of viewers out.

The engine makes updates only while somebody watches, so a :class:`LiveHub` subscribes with its first viewer and unsubscribes
with its last. Viewers take what is newest when they are ready for it: a slow one skips updates and delays nobody. What is
sent is encoded once, for all of them; how often, and how many steps at most, is as with the engine's own updates. An engine
that a viewer has paused runs again when nobody is left to see that it stands still. Nothing here knows of HTTP but for the
shape of a server-sent event.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Protocol

from pagebrain.config import PageBrainConfig
from pagebrain.errors import PageBrainError
from pagebrain.server.link.messages import ControlAction
from pagebrain.server.live.feed import INTERVAL_S, MAX_STEPS

logger = logging.getLogger(__name__)

MAX_VIEWERS = 32
"""Viewers at a time; each costs the server a connection and a few hundred kilobytes a second at most."""

RESUME_AFTER_S = 10.0
"""How long a pause lasts that nobody watches. A page that was reloaded, or lost its connection, is back sooner."""


class TooManyViewersError(PageBrainError):
    """All places are taken."""


class LiveEndedError(PageBrainError):
    """There are no updates to wait for any more; the message says why."""


class Subscription(Protocol):
    """Updates as they come, until closed."""

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]: ...
    def close(self) -> None: ...


class LiveSource(Protocol):
    """What the live view needs of :class:`~pagebrain.server.link.client.EngineClient`."""

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


def encode_json(value: Any) -> str:
    """JSON as short as it gets."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class Viewer:
    """One who watches: what it has been sent, and when it may be sent more."""

    def __init__(self, hub: "LiveHub", num_seen: int) -> None:
        self._hub = hub
        self._version = 0
        self._num_seen = num_seen
        self._due_s = 0.0
        self.news = asyncio.Event()

    async def next_update(self, timeout_s: float) -> bytes | None:
        """The newest update, as soon as there is one that this viewer has not seen; ``None`` if none comes in time.

        Raises:
            LiveEndedError: there will be no more.
        """
        if self._version == self._hub.version and self._hub.ended is None:
            self.news.clear()
            try:
                await asyncio.wait_for(self.news.wait(), timeout_s)
            except asyncio.TimeoutError:
                return None
        await asyncio.sleep(self._due_s - time.monotonic())  # others may go on meanwhile: what is newest then is sent
        if self._version == self._hub.version:
            raise LiveEndedError(self._hub.ended or "The live view has ended.")
        event = self._hub.event_since(self._num_seen)
        self._version, self._num_seen = self._hub.version, self._hub.num_steps
        self._due_s = time.monotonic() + INTERVAL_S
        return event


class LiveHub:
    """Collects updates while somebody watches.

    Attributes:
        version: counts the updates collected.
        num_steps: counts the steps in them, those left out included.
        ended: why there will be no more updates; ``None`` while there may be.
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
        """Those who watch now."""
        return len(self._viewers)

    def join(self) -> Viewer:
        """A new viewer, who gets the newest state at once and the latest steps with it.

        Raises:
            TooManyViewersError: there are :data:`MAX_VIEWERS` already.
            LiveEndedError: the engine is gone or the server is about to end.
        """
        if not self._source.is_alive:
            raise LiveEndedError(f"The engine has stopped: {self._source.failure}")
        if self._source.is_draining:
            raise LiveEndedError("The server is shutting down.")
        if len(self._viewers) >= MAX_VIEWERS:
            raise TooManyViewersError(f"{MAX_VIEWERS} viewers watch already, which is the most: try again later")
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        if self._collecting is None:
            self.ended = None
            self._subscription = self._source.subscribe_live()
            self._collecting = asyncio.create_task(self._collect(self._subscription))
        viewer = Viewer(self, self._steps[0][0] - 1 if self._steps else self.num_steps)
        if self._newest is None:
            viewer._version = self.version  # nothing to show yet
        self._viewers.add(viewer)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """This one watches no more; with the last one the engine stops making updates. May be called twice."""
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
        """Pause, resume or single-step the engine; returns whether it is paused now. Raises what the source raises."""
        was_paused = self._source.paused
        paused = await self._source.control(action)
        if paused and not was_paused:
            logger.info("paused by a viewer: requests wait until a viewer resumes, or none is left")
        elif was_paused and not paused:
            logger.info("resumed by a viewer")
        self._resume_unless_watched()  # who asked need not be one who watches
        return paused

    def _resume_unless_watched(self) -> None:
        if self._source.paused and not self._viewers and self._resuming is None:
            self._resuming = asyncio.create_task(self._resume_later())

    async def _resume_later(self) -> None:
        """Cancelled by the next viewer. An engine that is gone, or about to end, needs nothing any more."""
        await asyncio.sleep(RESUME_AFTER_S)
        self._resuming = None
        with contextlib.suppress(PageBrainError):
            if self._source.paused:
                await self._source.control("resume")
                logger.info("resumed: nobody watches any more")

    def event_since(self, num_seen: int) -> bytes:
        """The newest state, and the steps after the first ``num_seen``, as far as they are still known."""
        if num_seen not in self._events:
            if self._newest_text is None:
                self._newest_text = encode_json(self._newest)[1:]  # without the brace that opens it
            steps = [text for number, text in self._steps if number > num_seen]
            skipped = self.num_steps - num_seen - len(steps)
            data = f'{{"steps":[{",".join(steps)}],"skipped":{skipped},{self._newest_text}'
            self._events[num_seen] = encode_event("update", data)
        return self._events[num_seen]

    async def _collect(self, subscription: Subscription) -> None:
        """Take what the engine sends until it stops or nobody watches."""
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
