"""The handle to an engine in a process of its own: starts the process, sends and receives messages, ends the process."""

import asyncio
import contextlib
import logging
import multiprocessing
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

from pagebrain import errors
from pagebrain.config import PageBrainConfig
from pagebrain.engine.trace import EngineStats
from pagebrain.outputs import OutputDelta
from pagebrain.server.link import spawned
from pagebrain.server.link.handle import EngineDeadError, EngineListener
from pagebrain.server.link.messages import (
    Abort,
    Channel,
    Control,
    ControlAction,
    Ended,
    Failed,
    LiveUpdate,
    Paused,
    Ready,
    Refused,
    Shutdown,
    Stepped,
    Submit,
    Watch,
)

logger = logging.getLogger(__name__)

SHUTDOWN_S = 5.0
"""Time after which an engine's process that should end is killed."""


class EngineProcess:
    """An :class:`~pagebrain.server.link.handle.EngineHandle` to an engine in a child process.

    The child runs :func:`pagebrain.server.link.engine_main.main`. Two threads read and write its pipe; everything else
    happens on the event loop.
    """

    def __init__(self, config: PageBrainConfig, log_level: str = "warning") -> None:
        self.config = config
        self.notices: tuple[str, ...] = ()
        self.stats = EngineStats()
        self.paused = False
        self.heard_s = time.monotonic()
        self._log_level = log_level
        self._child: _Child | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: EngineListener | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._is_over = False  # told to stop, or dead
        self._unread: deque[list[Any]] = deque()
        self._pause_answers: deque[asyncio.Future[bool]] = deque()

    # What the server calls --------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The child's process number."""
        return None if self._child is None else self._child.pid

    async def start(self, listener: EngineListener) -> None:
        """See :class:`~pagebrain.server.link.handle.EngineHandle`."""
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._child = _Child(self.config, self._log_level, self._receive, lambda: self._call(self._on_end))
        ready = await self._ready
        self.config, self.notices = ready.config, ready.notices

    async def stop(self) -> None:
        """See :class:`~pagebrain.server.link.handle.EngineHandle`."""
        self._is_over = True
        self._fail_pauses(EngineDeadError("the engine has been stopped"))
        child, self._child = self._child, None
        if child is not None:
            await child.stop(at_once=self._ready is None or not self._ready.done() or self._ready.cancelled())

    def submit(self, request: Submit) -> None:
        """See :class:`~pagebrain.server.link.handle.EngineHandle`."""
        self._send(request)

    def abort(self, request_id: str) -> None:
        """See :class:`~pagebrain.server.link.handle.EngineHandle`."""
        self._send(Abort(request_id))

    def watch(self, on: bool) -> None:
        """See :class:`~pagebrain.server.link.handle.EngineHandle`."""
        self._send(Watch(on))

    def control(self, action: ControlAction) -> "asyncio.Future[bool]":
        """See :class:`~pagebrain.server.link.handle.EngineHandle`."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._pause_answers.append(answer)
        if self._is_over:
            self._fail_pauses(EngineDeadError("the engine has stopped"))
        self._send(Control(action))
        return answer

    def poll(self) -> None:
        """See :class:`~pagebrain.server.link.handle.EngineHandle`."""
        while self._unread:
            for message in self._unread.popleft():
                if self._is_over:
                    continue
                try:
                    self._act_on(message)
                except Exception as error:  # the message is lost: end the engine, so that no request waits for it forever
                    logger.exception("a message from the engine could not be handled")
                    self._die(f"the server failed over one of its messages ({type(error).__name__})")

    def _send(self, message: Any) -> None:
        if self._child is not None:
            self._child.send(message)

    # Messages of the child --------------------------------------------------------------------------------------------

    def _receive(self, messages: list[Any]) -> None:
        """Called in a thread."""
        self._unread.append(messages)
        self._call(self.poll)

    def _call(self, function: Callable[[], None]) -> None:
        """Call on the event loop, from another thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            logger.debug("the event loop is closed")

    def _act_on(self, message: Any) -> None:
        assert self._listener is not None and self._ready is not None
        self.heard_s = time.monotonic()
        if isinstance(message, Stepped):
            self.stats = message.stats
            self._listener.on_step([OutputDelta._make(packed) for packed in message.deltas], message.stats)
        elif isinstance(message, LiveUpdate):
            self._listener.on_live(message.update)
        elif isinstance(message, Paused):
            self.paused = message.paused
            answer = self._pause_answers.popleft()
            if not answer.done():
                answer.set_result(message.paused)
        elif isinstance(message, Refused):
            self._listener.on_refused(message.request_id, message.message, message.is_mistake)
        elif isinstance(message, Ended):
            self._listener.on_ended(message.request_id)
        elif isinstance(message, Ready):
            if not self._ready.done():
                self._ready.set_result(message)
        elif isinstance(message, Failed):
            if not self._ready.done():
                kind = getattr(errors, message.error, None) or EngineDeadError
                self._ready.set_exception(kind(message.message))
                self._is_over = True
            self._die(message.message)

    def _on_end(self) -> None:
        self.poll()
        self._die("its process ended unexpectedly")

    def _die(self, reason: str) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._child is not None:
            self._child.kill()  # it may live: a message could not be sent, or not be handled
        assert self._listener is not None and self._ready is not None
        error = EngineDeadError(f"the engine has stopped: {reason}")
        self._fail_pauses(error)
        if not self._ready.done():
            self._ready.set_exception(error)
            return
        self._listener.on_dead(reason)

    def _fail_pauses(self, error: EngineDeadError) -> None:
        while self._pause_answers:
            answer = self._pause_answers.popleft()
            if not answer.done():
                answer.set_exception(error)


class _Child:
    """The child process and the pipe to it.

    Args:
        config, log_level: arguments of the child.
        on_messages: called in a thread with the messages that arrived.
        on_end: called in a thread when the child has ended.
    """

    def __init__(
        self,
        config: PageBrainConfig,
        log_level: str,
        on_messages: Callable[[list[Any]], None],
        on_end: Callable[[], None],
    ) -> None:
        pickled = pickle.dumps(config)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=spawned.main, args=(theirs, pickled, log_level), name="pagebrain-engine", daemon=True
        )
        try:
            with _signals_held_back():
                self._process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()  # only the child holds it now, so the pipe ends with the child
        self._channel = Channel(ours, on_messages, on_end, name="pagebrain-server")
        self._channel.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, message: Any) -> None:
        """Send without waiting. A message to a process that has ended is dropped."""
        self._channel.send(message)

    def kill(self) -> None:
        self._process.kill()

    async def stop(self, at_once: bool) -> None:
        """End the process and close the pipe. The process may finish its step, unless ``at_once``."""
        if at_once:
            self._process.kill()
        self._channel.send(Shutdown())
        await asyncio.to_thread(self._process.join, SHUTDOWN_S)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        await asyncio.to_thread(self._channel.close)
        self._process.close()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block signals in a process that starts now: the whole group gets them, and the process cannot ignore them yet."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it starts with the first process, and unblocks signals then
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
