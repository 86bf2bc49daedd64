"""The engine's process as its parent sees it: started, spoken to, ended."""

import asyncio
import contextlib
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

from pagebrain.config import PageBrainConfig
from pagebrain.server.link import spawned
from pagebrain.server.link.messages import Channel, Shutdown

SHUTDOWN_S = 5.0
"""How long the engine's process may take to end before it is killed."""


class EngineProcess:
    """A process that runs :func:`pagebrain.server.link.engine_main.main`, by way of :mod:`pagebrain.server.link.spawned`.

    Args:
        config, log_level: what it gets.
        on_messages: called in a thread with what it says.
        on_end: called in a thread, once, when it is gone.
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
            theirs.close()  # so that the engine's process alone holds it, and its death is seen here
        self._channel = Channel(ours, on_messages, on_end, name="pagebrain-server")
        self._channel.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, message: Any) -> None:
        """Say something, without waiting; what is said to a process that has ended goes nowhere."""
        self._channel.send(message)

    def kill(self) -> None:
        """End it now, whatever it is doing."""
        self._process.kill()

    async def stop(self, at_once: bool) -> None:
        """End it and take everything that belongs to it away. It may finish what it is doing, unless ``at_once``."""
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
    """A process that starts now begins with signals blocked: they reach the whole group, before it can ignore them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it unblocks signals when it starts, and it starts with the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
