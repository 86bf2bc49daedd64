"""What travels between the server's process and the engine's, and the channel it travels on.

Messages are plain data. Those that come with every step are tuples of tuples: they are pickled hundreds of times a second.
A :class:`Channel` never makes its owner wait: a thread of its own sends, and another one calls back with what has come.
"""

import gc
import logging
import pickle
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from pagebrain.config import PageBrainConfig
from pagebrain.engine.trace import EngineStats
from pagebrain.outputs import OutputDelta
from pagebrain.sampling_params import SamplingParams
from pagebrain.server.link.scores import Scores

logger = logging.getLogger(__name__)

# To the engine --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submit:
    """A request, checked already by the server's process. With a ``source`` it waits for the turn of that client."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    source: str | None = None


@dataclass(frozen=True)
class Abort:
    """Nobody waits for this request any more."""

    request_id: str


@dataclass(frozen=True)
class Watch:
    """Send live updates from now on, or stop doing so."""

    on: bool


ControlAction = Literal["pause", "resume", "step"]


@dataclass(frozen=True)
class Control:
    """Stop the engine between two steps, compute a single one, or let it run."""

    action: ControlAction


@dataclass(frozen=True)
class Shutdown:
    """End now."""


# From the engine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The engine is built. ``config`` is resolved."""

    config: PageBrainConfig
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    """The engine ends, or could not be built; ``error`` names the exception's type. The message quotes no prompt."""

    error: str
    message: str


@dataclass(frozen=True)
class Refused:
    """The engine did not take a request that the server had taken: a mistake in it, or in a part that is somebody's own."""

    request_id: str
    message: str
    is_mistake: bool


@dataclass(frozen=True)
class Ended:
    """Nothing more will be said of this request, in answer to each :class:`Abort`."""

    request_id: str


@dataclass(frozen=True)
class Stepped:
    """What a step brought, and how the engine stands. A delta is packed by :func:`pack_delta`."""

    deltas: tuple["PackedDelta", ...]
    stats: EngineStats


@dataclass(frozen=True)
class LiveUpdate:
    """For the live view: JSON values made of ``StepTrace`` records."""

    update: dict[str, Any]


@dataclass(frozen=True)
class Paused:
    """Whether the engine is stopped between two steps, in answer to each :class:`Control`."""

    paused: bool


PackedDelta = tuple[Any, ...]
"""The fields of an :class:`~pagebrain.outputs.OutputDelta` in a plain tuple, which takes a third of the time to pickle."""


def settle_memory() -> None:
    """Let Python's garbage collector look no more at what is there now: libraries and a model, which stay.

    They are some 400,000 objects, and going through them takes a few tenths of a second, in which every stream stands still.
    """
    gc.collect()
    gc.freeze()


def pack_delta(delta: OutputDelta) -> PackedDelta:
    """A delta for the pipe: log-probabilities packed, without the whole request that comes with the last delta."""
    return (
        delta.request_id,
        delta.index,
        delta.text,
        delta.token_ids,
        Scores.pack(delta.logprobs) if delta.logprobs else (),
        delta.finish_reason,
        delta.stop_reason,
        None if delta.prompt_logprobs is None else Scores.pack(delta.prompt_logprobs),
        delta.metrics,
        None,
    )


class Channel:
    """One end of the pipe between the two processes.

    Args:
        connection: this end.
        on_messages: called in a thread of the channel's with what has come, in order, several at a time if they came fast.
        on_end: called in that thread, once, when the other end is gone.
    """

    def __init__(
        self, connection: Connection, on_messages: Callable[[list[Any]], None], on_end: Callable[[], None], name: str
    ) -> None:
        self._connection = connection
        self._on_messages = on_messages
        self._on_end = on_end
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name=f"{name}-sender", daemon=True)
        self._receiver = threading.Thread(target=self._receive_all, name=f"{name}-receiver", daemon=True)

    def start(self) -> None:
        """Begin to send and to receive."""
        self._sender.start()
        self._receiver.start()

    def send(self, message: Any) -> None:
        """Send, in order, as soon as the other side takes it. What is sent after the end goes nowhere."""
        self._outbox.put(message)

    def flush(self, timeout_s: float) -> None:
        """Send what is left, send nothing after that, and wait for it no longer than ``timeout_s``."""
        self._outbox.put(_END)
        self._sender.join(timeout_s)

    def close(self) -> None:
        """Let go of the connection; its other end is gone already, and both threads end over that."""
        self.flush(CLOSE_S)
        self._receiver.join(CLOSE_S)
        self._connection.close()

    def _send_all(self) -> None:
        ended = False
        while not ended:
            messages = [self._outbox.get()]
            while not self._outbox.empty():
                messages.append(self._outbox.get())
            ended = _END in messages
            try:
                self._connection.send_bytes(pickle.dumps([m for m in messages if m is not _END], pickle.HIGHEST_PROTOCOL))
            except OSError:  # the receiver sees the end too, and tells
                return
            except Exception:  # a message was lost: whoever waits for it must not wait for ever
                logger.exception("a message between server and engine could not be sent")
                self._on_end()
                return

    def _receive_all(self) -> None:
        try:
            while True:
                self._on_messages(pickle.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("a message between server and engine could not be read")
        self._on_end()


CLOSE_S = 1.0

_END = None
"""In the outbox: nothing follows."""
