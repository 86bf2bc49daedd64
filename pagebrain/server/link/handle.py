"""What the server calls on an engine (:class:`EngineHandle`), and what it is told (:class:`EngineListener`).

A handle hides where the engine runs. :class:`~pagebrain.server.link.process.EngineProcess` runs it in a process of its own;
several handles can stand behind one router. :class:`~pagebrain.server.link.client.EngineClient` is the listener.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from pagebrain.config import PageBrainConfig
from pagebrain.engine.trace import EngineStats
from pagebrain.errors import PageBrainError
from pagebrain.outputs import OutputDelta
from pagebrain.server.link.messages import ControlAction, Submit


class EngineDeadError(PageBrainError):
    """The engine has stopped. All its requests have failed."""


class EngineListener(Protocol):
    """What a handle calls, on the event loop on which it was started."""

    def on_step(self, deltas: Sequence[OutputDelta], stats: EngineStats) -> None:
        """The engine has stepped, or its queue has changed. ``deltas`` are in the order of the tokens."""
        ...

    def on_refused(self, request_id: str, message: str, is_mistake: bool) -> None:
        """The engine refused a request. ``is_mistake``: the request is invalid; otherwise a part of the engine failed."""
        ...

    def on_ended(self, request_id: str) -> None:
        """The engine has ended an aborted request. No more calls follow for it."""
        ...

    def on_live(self, update: dict[str, Any]) -> None:
        """An update of the live view, in JSON values."""
        ...

    def on_dead(self, reason: str) -> None:
        """The engine has stopped unexpectedly. This is the last call."""
        ...


class EngineHandle(Protocol):
    """An engine. ``start``, ``control`` and ``stop`` are awaited; the other methods return at once.

    Attributes:
        config: resolved once :meth:`start` has returned.
        notices: lines about the engine for its user; set once :meth:`start` has returned.
        stats: the engine's state after its last step.
        paused: whether the engine is stopped between two steps.
        heard_s: time of the engine's last message, in seconds of ``time.monotonic``.
        pid: the process in which the engine runs; ``None`` before it starts.
    """

    config: PageBrainConfig
    notices: tuple[str, ...]
    stats: EngineStats
    paused: bool
    heard_s: float

    @property
    def pid(self) -> int | None: ...

    async def start(self, listener: EngineListener) -> None:
        """Start the engine and wait until it is ready.

        Raises the error of building the engine (``ConfigError``, ``ModelLoadError``, ``PartError``), or ``EngineDeadError``.
        """
        ...

    def submit(self, request: Submit) -> None:
        """Send a request. ``on_step`` gets its deltas, ``on_refused`` a refusal."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request. ``on_ended`` is called when the engine has ended it."""
        ...

    def watch(self, on: bool) -> None:
        """Start to call ``on_live``, first with the present state; or stop."""
        ...

    def control(self, action: ControlAction) -> "asyncio.Future[bool]":
        """Pause, resume or single-step the engine. The future gives whether it is paused, or ``EngineDeadError``."""
        ...

    def poll(self) -> None:
        """Call the listener for arrived messages now, instead of in the event loop's next turn."""
        ...

    async def stop(self) -> None:
        """End the engine. An engine that is still loading ends at once."""
        ...
