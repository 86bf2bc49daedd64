"""The messages between the server's process and the engine's process, and the channel that carries them.

Messages are plain data. Those of every step hold tuples of tuples, because they are pickled hundreds of times a second. The
methods of a :class:`Channel` do not wait: one thread sends, and another thread calls back with the messages that arrive.
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
from pagebrain.sampling_params import BeamSearchParams, SamplingParams
from pagebrain.server.link.scores import Scores

logger = logging.getLogger(__name__)

# To the engine --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submit:
    """A request that the server's process has checked. With a ``source`` it waits for the turn of that client.

    It shares cached prefixes only with requests of the same ``cache_salt``. With ``beam_params`` it is answered by beam
    search, and ``params.n`` is the number of beams.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    source: str | None = None
    cache_salt: str | None = None
    beam_params: BeamSearchParams | None = None

    @property
    def params_for_engine(self) -> SamplingParams | BeamSearchParams:
        """What the engine's request is made with."""
        return self.beam_params or self.params


@dataclass(frozen=True)
class Abort:
    """End a request."""

    request_id: str


@dataclass(frozen=True)
class Watch:
    """Start or stop live updates."""

    on: bool


ControlAction = Literal["pause", "resume", "step"]


@dataclass(frozen=True)
class Control:
    """Stop the engine between two steps, compute a single step, or let the engine run."""

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
    """The engine failed, or could not be built. ``error`` is the exception's type. The message quotes no prompt."""

    error: str
    message: str


@dataclass(frozen=True)
class Refused:
    """The engine refused a request that the server admitted. ``is_mistake``: it is invalid; otherwise a part failed."""

    request_id: str
    message: str
    is_mistake: bool


@dataclass(frozen=True)
class Ended:
    """The answer to each :class:`Abort`. No more messages follow for this request."""

    request_id: str


@dataclass(frozen=True)
class Stepped:
    """The deltas of a step, packed by :func:`pack_delta`, and the engine's state."""

    deltas: tuple["PackedDelta", ...]
    stats: EngineStats


@dataclass(frozen=True)
class LiveUpdate:
    """An update of the live view: JSON values made from ``StepTrace`` records."""

    update: dict[str, Any]


@dataclass(frozen=True)
class Paused:
    """The answer to each :class:`Control`: whether the engine is stopped between two steps."""

    paused: bool


PackedDelta = tuple[Any, ...]
"""The fields of an :class:`~pagebrain.outputs.OutputDelta` in a plain tuple, which takes a third of the time to pickle."""


def settle_memory() -> None:
    """Exclude the objects that exist now, of libraries and the model, from Python's garbage collection.

    They are some 400,000 objects. A collection of them takes a few tenths of a second, in which no stream gets tokens.
    """
    gc.collect()
    gc.freeze()


def pack_delta(delta: OutputDelta) -> PackedDelta:
    """A delta for the pipe, with packed log-probabilities and without the request's output."""
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
        on_messages: called in a thread of the channel with the messages that arrived, in order.
        on_end: called in a thread of the channel when the other end is closed or a message is lost.
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
        """Start to send and to receive."""
        self._sender.start()
        self._receiver.start()

    def send(self, message: Any) -> None:
        """Queue a message. Messages are sent in order; after the end of the channel they are dropped."""
        self._outbox.put(message)

    def flush(self, timeout_s: float) -> None:
        """Send the queued messages and then no more. Wait for it, ``timeout_s`` at most."""
        self._outbox.put(_END)
        self._sender.join(timeout_s)

    def close(self) -> None:
        """Close the connection. Its other end must be closed already, so that both threads end."""
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
            except OSError:  # the receiving thread sees the end too, and calls on_end
                return
            except Exception:  # the message is lost: end the channel, so that no request waits for it forever
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
"""The last entry of the outbox."""
