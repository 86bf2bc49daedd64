"""An event loop for tests: its clock jumps, it says when nothing more happens, and it ends whatever runs on it.

Races are tested without luck this way. A step in a thread is held by a :class:`Hold` at the moment of interest. While
coroutines only wait for time to pass, no time passes here: the clock jumps to the next timer.
"""

import asyncio
import ctypes
import selectors
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

THREAD_S = 3.0
"""Real seconds that the loop waits for a thread's work before its clock goes on, and that a held thread waits."""

GRACE_S = 0.002
"""The same for the work of a thread that the loop was not asked for."""

MAX_TURNS = 2000
"""Turns of the loop in a row in which no time passes. Then each turn takes a hundredth of a second, so that the timeout of
a test is reached beside a coroutine that never sleeps."""


class _Selector(selectors.DefaultSelector):
    loop: "OwnLoop"

    def select(self, timeout: float | None = None) -> Any:
        """Events of sockets and of other threads. Where asyncio would sleep for ``timeout``, the clock jumps."""
        found = super().select(0)
        loop = self.loop
        if found or timeout is not None and timeout <= 0:
            loop.num_turns += 1
            loop.now += 0.01 if loop.num_turns > MAX_TURNS else 0.0
            return found
        if found := super().select(THREAD_S if loop.num_jobs > loop.num_held else GRACE_S):
            loop.num_turns += 1
            return found
        loop.num_turns = 0
        if loop.waiting_for_rest:
            for future in loop.waiting_for_rest:
                future.set_result(None)
            loop.waiting_for_rest = []
            return found
        if timeout is None:  # no timer either: only a thread that the loop does not know of can bring something
            if not (found := super().select(THREAD_S)):
                raise AssertionError("the test waits for something that never comes")
            return found
        loop.now += timeout
        loop.jumped += timeout
        return found


class OwnLoop(asyncio.SelectorEventLoop):
    """The loop.

    Attributes:
        now: its clock, in seconds.
        jumped: seconds that coroutines slept while nothing else was left to do.
        num_jobs: calls in threads that have not ended, of which ``num_held`` are held by the test.
        num_turns: turns in a row in which a coroutine was ready to run.
    """

    def __init__(self) -> None:
        self.now = self.jumped = 0.0
        self.num_jobs = self.num_held = self.num_turns = 0
        self.holds: list[Hold] = []
        self.waiting_for_rest: list[asyncio.Future[None]] = []
        self._timers: list[asyncio.TimerHandle] = []
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """The clock that all timeouts and sleeps go by."""
        return self.now

    def call_at(self, when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:  # type: ignore[override]
        """As in asyncio."""
        self._timers.append(handle := super().call_at(when, *args, **options))
        return handle

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        """As in asyncio; the call counts as a job until it has ended.

        Without an executor it gets a daemon thread of its own, so a call that never ends does not keep the process.
        """
        self.num_jobs += 1
        if executor is not None:
            future = super().run_in_executor(executor, func, *args)
        else:
            future = self.create_future()
            threading.Thread(target=self._work, args=(future, func, args), daemon=True).start()
        future.add_done_callback(self._job_ended)
        return future

    def _work(self, future: "asyncio.Future[Any]", func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        end: Callable[[Any], None]
        result: Any
        try:
            end, result = future.set_result, func(*args)
        except BaseException as error:
            end, result = future.set_exception, error
        with suppress(RuntimeError):  # the loop is closed
            self.call_soon_threadsafe(lambda: None if future.done() else end(result))

    def _job_ended(self, _: object) -> None:
        self.num_jobs -= 1

    @property
    def timers(self) -> list[float]:
        """Seconds until each timer that is set now."""
        return [handle.when() - self.now for handle in self._timers if not handle.cancelled() and handle.when() > self.now]

    async def rest(self) -> None:
        """Return when all coroutines wait, and no thread works except those that are held. Timers may be set."""
        self.waiting_for_rest.append(future := self.create_future())
        await future


class Hold:
    """A place where a thread stops until the test lets it go on. Make it on the loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, OwnLoop)
        self.reached = asyncio.Event()
        self._loop, self._thread = loop, threading.get_ident()
        self._release = threading.Event()
        self._num_here = 0
        loop.holds.append(self)

    def stop(self) -> None:
        """Called by the thread: wait for :meth:`release`."""
        assert threading.get_ident() != self._thread, "the step ran in the event loop's own thread and blocks the loop"
        if not self._release.is_set():
            self._loop.call_soon_threadsafe(self._arrive)
            released = self._release.wait(THREAD_S)
            assert released, "no other coroutine could run while a step was under way: the step blocks the event loop"

    def _arrive(self) -> None:
        if not self._release.is_set():
            self._loop.num_held += 1
            self._num_here += 1
        self.reached.set()

    def release(self) -> None:
        """Let the thread go on, now and whenever it comes here again."""
        self._release.set()
        self._loop.num_held -= self._num_here
        self._num_here = 0


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine on an :class:`OwnLoop` of its own, and end all that it leaves behind, in bounded time."""
    loop = OwnLoop()
    try:
        loop.run_until_complete(scenario())
    finally:
        for hold in loop.holds:
            hold.release()
        for task in (tasks := asyncio.all_tasks(loop)):
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=1))
        for task in asyncio.all_tasks(loop):  # it swallows its cancellation, and would swallow its end as garbage too
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(task))
        loop.close()
