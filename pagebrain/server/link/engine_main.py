"""The engine's process: builds the engine, takes requests from the server's process, and steps.

This process has no HTTP code, so HTTP cannot delay a step. Only the main thread uses the engine. It reads messages between
two steps. When the server's process has ended, for any reason, this process ends at once.
"""

import dataclasses
import logging
import os
import queue
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

from pagebrain.build import BuiltEngine, build_engine
from pagebrain.config import PageBrainConfig
from pagebrain.engine.engine import Engine
from pagebrain.errors import InvalidRequestError, PageBrainError, StepError, is_out_of_memory, place
from pagebrain.quiet import quiet
from pagebrain.server.link.fair_queue import FairQueue
from pagebrain.server.link.messages import (
    Abort,
    Channel,
    Control,
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
    pack_delta,
    settle_memory,
)
from pagebrain.server.live.feed import LiveFeed
from pagebrain.server.logs import configure_logging
from pagebrain.standard_streams import drain_output, queue_output

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Steps that may fail in a row before the engine ends. A failed step is rolled back, so it is safe to try again."""

FLUSH_S = 5.0


def main(connection: Connection, config: PageBrainConfig, log_level: str) -> None:
    """Run the engine until the server's process sends ``Shutdown`` or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the whole process group gets both, and the server's process acts on them
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive(messages: list[Any]) -> None:
        for message in messages:
            inbox.put(message)

    queue_output()
    channel = Channel(connection, receive, on_end=lambda: _exit(1), name="pagebrain-engine")
    channel.start()
    try:
        configure_logging(log_level)
        with quiet():
            built = build_engine(config)
            settle_memory()
            channel.send(Ready(_picklable(built), built.notices))
            _run(EngineLoop(built.engine, channel, inbox))
    except EngineFailure as failure:
        channel.send(Failed(type(failure).__name__, str(failure)))
    except PageBrainError as error:  # the engine could not be built: no prompt can be in the message yet
        channel.send(Failed(type(error).__name__, " ".join(str(error).split())))
    except Exception as error:
        logger.exception("the engine's process ends")
        channel.send(Failed(type(error).__name__, kind_and_place(error)))
    finally:
        channel.flush(FLUSH_S)
    _exit(0)


def _exit(status: int) -> None:
    """Write the queued output and end the process, even if threads of libraries still run."""
    drain_output()
    os._exit(status)


class EngineFailure(Exception):
    """The engine cannot continue. The message names the exception and its place, and quotes no prompt."""


def _run(loop: "EngineLoop") -> None:
    try:
        loop.run()
    except Exception as error:
        logger.exception("the engine cannot go on")
        raise EngineFailure(kind_and_place(error)) from error


def kind_and_place(error: BaseException) -> str:
    """Type and place of the exception that caused ``error``, without its message, which may quote a prompt."""
    what = "out of memory: " if is_out_of_memory(error) else ""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{what}{type(error).__name__}{place(error)}"


def _picklable(built: BuiltEngine) -> PageBrainConfig:
    """The config without parts that are objects: they stay in this process."""
    names = {part: named for part, named in built.config.parts.items() if isinstance(named, str)}
    return dataclasses.replace(built.config, parts=names)


class EngineLoop:
    """The loop around an engine.

    Args:
        engine: only this loop uses it.
        channel: to the server's process.
        inbox: messages from the server's process.
    """

    def __init__(self, engine: Engine, channel: Channel, inbox: "queue.SimpleQueue[Any]") -> None:
        self.engine = engine
        self.channel = channel
        self.inbox = inbox
        self.queue = FairQueue(engine.config.seed)
        self.feed: LiveFeed | None = None
        self.paused = False
        self.single_steps = 0
        self.stopping = False
        self._num_failures = 0
        self._last_stats = engine.stats()

    def run(self) -> None:
        """Serve until ``Shutdown``. Raises the error of the last step if ``MAX_FAILURES`` steps in a row failed."""
        while True:
            self._read_messages()
            if self.stopping:
                return
            if self._may_step:
                self._step()
            self._send_live()

    @property
    def _may_step(self) -> bool:
        return self.engine.has_unfinished_requests and (not self.paused or self.single_steps > 0)

    def _read_messages(self) -> None:
        """Act on all messages in the inbox. If there is no step to do, wait for the next message."""
        while not self.stopping:
            try:
                if self._may_step:
                    message = self.inbox.get_nowait()
                else:
                    message = self.inbox.get(timeout=None if self.feed is None else self.feed.wait_s(time.monotonic()))
            except queue.Empty:
                return
            self._act_on(message)

    def _act_on(self, message: Any) -> None:
        if isinstance(message, Submit):
            if message.source is None:
                self._submit(message)
            else:
                self.queue.put(message, message.source)
        elif isinstance(message, Abort):
            self.queue.remove(message.request_id)
            self.engine.abort(message.request_id)
            self.channel.send(Ended(message.request_id))
        elif isinstance(message, Watch):
            self._watch(message.on)
        elif isinstance(message, Control):
            self.paused = message.action != "resume"
            self.single_steps += message.action == "step" and self.engine.has_unfinished_requests
            self.channel.send(Paused(self.paused))
        elif isinstance(message, Shutdown):
            self.stopping = True
        self._take_turns()
        if not self._may_step:  # no step will report the new state
            self._send_stats()
            if self.feed is not None:
                self.feed(self.engine.snapshot())

    def _take_turns(self) -> None:
        """Give the engine the queued requests that its next step can start. Called when there may be new room."""
        while (message := self.queue.take(self.engine)) is not None:
            self._submit(message)

    def _submit(self, message: Submit) -> None:
        try:
            self.engine.add_request(
                message.prompt_token_ids,
                message.params_for_engine,
                message.request_id,
                keeps_logprobs=False,
                cache_salt=message.cache_salt,
            )
        except InvalidRequestError as error:  # rare, because the server's process checks requests before
            self.channel.send(Refused(message.request_id, str(error), is_mistake=True))
        except Exception as error:  # a part that the user wrote failed: end this request alone
            logger.warning("a request could not be added: %s", kind_and_place(error))
            logger.debug("the exception", exc_info=True)
            self.engine.abort(message.request_id)
            text = f"the engine failed over this request: {kind_and_place(error)}"
            self.channel.send(Refused(message.request_id, text, is_mistake=False))

    def _step(self) -> None:
        self.single_steps = max(0, self.single_steps - 1)
        try:
            deltas = self.engine.step()
        except StepError as error:
            self._num_failures += 1
            logger.warning("a step failed, %d of %d in a row: %s", self._num_failures, MAX_FAILURES, kind_and_place(error))
            logger.debug("the exception", exc_info=True)
            if self._num_failures == MAX_FAILURES:
                raise
            return
        self._num_failures = 0
        self._take_turns()
        self._send_stats(tuple(pack_delta(delta) for delta in deltas))
        if not self.engine.has_unfinished_requests:
            self.single_steps = 0
            if self.feed is not None:
                self.feed(self.engine.snapshot())

    def _send_stats(self, deltas: tuple[Any, ...] = ()) -> None:
        stats = self.engine.stats()
        launched = stats.num_tokens - self._last_stats.num_tokens
        self._last_stats = stats
        num_waiting = stats.num_waiting + self.queue.num_sequences
        stats = dataclasses.replace(stats, num_waiting=num_waiting, last_step_tokens=(launched,) if launched else ())
        self.channel.send(Stepped(deltas, stats))

    def _watch(self, on: bool) -> None:
        if not on:
            self.engine.observers = [observer for observer in self.engine.observers if observer is not self.feed]
            self.feed = None
            return
        if self.feed is None:
            self.feed = LiveFeed()
            self.engine.observers.append(self.feed)
        self.feed(self.engine.snapshot())  # a new subscriber gets the present state at once

    def _send_live(self) -> None:
        now = time.monotonic()
        if self.feed is not None and self.feed.wait_s(now) == 0.0:
            self.channel.send(LiveUpdate(self.feed.update(now, self.engine.stats(), self.paused)))
