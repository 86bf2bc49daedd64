"""Admission: a limit on the requests that wait for their first token, and the time to wait when it is reached."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pagebrain.errors import PageBrainError

RATE_WINDOW_S = 10.0
SLICE_S = 0.25
"""The pace is measured in slices of this length. A pace that was measured for a shorter time is not used."""

MAX_RETRY_AFTER_S = 60
UNKNOWN_RETRY_AFTER_S = 2
"""The answer if the pace is unknown: there was no such queue in the last seconds, or no request got a first token."""


class QueueFullError(PageBrainError):
    """The limit of waiting requests is reached. Nothing was changed.

    Attributes:
        retry_after_s: whole seconds after which the queue probably has room.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Admission:
    """Counts requests, and their prompt tokens, from their arrival to their first token.

    Args:
        max_requests, max_tokens: limits of what waits. A call that is larger than a limit is admitted when the queue is
            empty; otherwise it could never be admitted.
        clock: seconds, monotonic.
    """

    def __init__(self, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._waiting: dict[str, tuple[int, str | None]] = {}
        self._pace = Pace(clock)

    @property
    def num_requests(self) -> int:
        """Requests that wait for their first token."""
        return len(self._waiting)

    def check(self, num_requests: int, num_tokens: int, source: str | None = None) -> None:
        """Raise ``QueueFullError`` if these requests would pass a limit. A ``source`` may fill half of the queue."""
        if self._waiting and self.num_requests + num_requests > self.max_requests:
            raise QueueFullError(
                f"{_requests_are(self.num_requests)} waiting and {num_requests} more would pass the limit of "
                f"{self.max_requests}: try again later",
                self._retry_after_s(),
            )
        if self._waiting and self.num_tokens + num_tokens > self.max_tokens:
            raise QueueFullError(
                f"{self.num_tokens} prompt tokens are waiting and {num_tokens} more would pass the limit of "
                f"{self.max_tokens}: try again later",
                self._retry_after_s(),
            )

        if source is not None:
            self._check_share(num_requests, num_tokens, source)

    def _check_share(self, num_requests: int, num_tokens: int, source: str) -> None:
        held = [tokens for tokens, whose in self._waiting.values() if whose == source]
        if held and (2 * (len(held) + num_requests) > self.max_requests or 2 * (sum(held) + num_tokens) > self.max_tokens):
            raise QueueFullError(
                f"{_requests_are(len(held))} waiting from this client with {sum(held)} prompt tokens, and a client may fill "
                f"half of the queue, {self.max_requests // 2} requests and {self.max_tokens // 2} tokens: try again later",
                self._retry_after_s(),
            )

    def wait(self, request_id: str, num_tokens: int, source: str | None = None) -> None:
        """Count a request as waiting."""
        self._pace.note(self.num_requests)
        self._waiting[request_id] = (num_tokens, source)
        self.num_tokens += num_tokens

    def start(self, request_id: str) -> None:
        """The request got its first token. Calls for a request that does not wait are ignored."""
        if request_id in self._waiting:
            self._pace.num_started += 1
            self.leave(request_id)

    def leave(self, request_id: str) -> None:
        """The request does not wait any more."""
        self._pace.note(self.num_requests)
        num_tokens, _ = self._waiting.pop(request_id, (0, None))
        self.num_tokens -= num_tokens

    def _retry_after_s(self) -> int:
        """Time in which the queue becomes empty at its recent pace."""
        self._pace.note(self.num_requests)
        per_s = self._pace.per_s(self.num_requests)
        if per_s is None:
            return UNKNOWN_RETRY_AFTER_S
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self.num_requests / per_s)))


@dataclass
class _Slice:
    """Counts of a slice of time. ``waiting_s`` is the sum of the times that requests waited in it."""

    seconds: float = 0.0
    end_s: float = 0.0
    waiting_s: float = 0.0
    num_started: int = 0


class Pace:
    """The number of requests per second that get their first token, for a queue of some length.

    An engine takes many waiting requests into one step. So a short queue has a lower pace than a long one, often the pace at
    which requests arrive. The pace of a long queue can be measured only while a long queue waits.

    Attributes:
        num_started: total of requests that got their first token. The owner counts them.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.num_started = 0
        self._clock = clock
        self._noted_s = clock()
        self._num_noted = 0
        self._slices = deque([_Slice()])

    def note(self, num_waiting: int) -> None:
        """Note that ``num_waiting`` requests waited since the last call. Call it before each change and before ``per_s``."""
        now_s, current = self._clock(), self._slices[-1]
        current.seconds += now_s - self._noted_s
        current.waiting_s += num_waiting * (now_s - self._noted_s)
        current.num_started += self.num_started - self._num_noted
        current.end_s = self._noted_s = now_s
        self._num_noted = self.num_started
        if current.seconds >= SLICE_S:
            self._slices.append(_Slice())
            while self._slices[0].end_s < now_s - RATE_WINDOW_S and len(self._slices) > 1:
                self._slices.popleft()

    def per_s(self, num_waiting: int) -> float | None:
        """The pace in those slices of the last ten seconds in which at least half as many waited. ``None`` is unknown."""
        busy = [part for part in self._slices if part.waiting_s >= num_waiting / 2 * part.seconds]
        seconds = sum(part.seconds for part in busy)
        num_started = sum(part.num_started for part in busy)
        return num_started / seconds if num_started and seconds >= SLICE_S else None


def _requests_are(count: int) -> str:
    return "1 request is" if count == 1 else f"{count} requests are"
