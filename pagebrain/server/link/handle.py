"""How the server reaches an engine: it starts the engine through a handle, hands requests over, and listens.

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
    """The engine has stopped, and with it every request."""


class EngineListener(Protocol):
    """What a handle calls, on the event loop that it was started on."""

    def on_step(self, deltas: Sequence[OutputDelta], stats: EngineStats) -> None:
        """The engine has stepped, or its queue has changed. ``deltas`` are in the order of the tokens."""
        ...

    def on_refused(self, request_id: str, message: str, is_mistake: bool) -> None:
        """The engine did not take a request. ``is_mistake``: the request is wrong; otherwise a part of the engine failed."""
        ...

    def on_ended(self, request_id: str) -> None:
        """Nothing more comes for a request that was aborted."""
        ...

    def on_live(self, update: dict[str, Any]) -> None:
        """An update of the live view, as JSON values."""
        ...

    def on_dead(self, reason: str) -> None:
        """The engine has stopped although nothing told it to. Called once, and nothing is called after it."""
        ...


class EngineHandle(Protocol):
    """An engine. ``start``, ``control`` and ``stop`` are awaited; the other methods return at once.

    Attributes:
        config: as it was given; resolved once :meth:`start` has returned.
        notices: lines about the engine for its user; known once :meth:`start` has returned.
        stats: the engine's state after its last step.
        paused: whether the engine is stopped between two steps.
        heard_s: when the engine last said something, in seconds of ``time.monotonic``.
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

        Raises what building the engine raised (``ConfigError``, ``ModelLoadError``, ``PartError``), or ``EngineDeadError``.
        """
        ...

    def submit(self, request: Submit) -> None:
        """Hand a request over. Its deltas come to ``on_step``, a refusal to ``on_refused``."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request. ``on_ended`` says when the engine has let go of it."""
        ...

    def watch(self, on: bool) -> None:
        """Call ``on_live`` from now on, beginning with the present state; or stop calling it."""
        ...

    def control(self, action: ControlAction) -> "asyncio.Future[bool]":
        """Pause, resume or single-step the engine; the future says whether it is paused then, or ``EngineDeadError``."""
        ...

    def poll(self) -> None:
        """Tell the listener now what has arrived, instead of in the event loop's next turn."""
        ...

    async def stop(self) -> None:
        """End the engine; one that is still loading, at once."""
        ...
