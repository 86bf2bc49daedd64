"""The bounded queue: how many requests may wait for their first token, and what those are told who come when it is full."""

import math
import time
from collections import deque
from collections.abc import Callable

from pagebrain.errors import PageBrainError

RATE_WINDOW_S = 10.0
MAX_RETRY_AFTER_S = 60
UNKNOWN_RETRY_AFTER_S = 2
"""What is said where the pace is unknown: nobody has got a first token lately."""


class QueueFullError(PageBrainError):
    """As many requests wait as the server lets wait; nothing was changed.

    Attributes:
        retry_after_s: whole seconds after which there is probably room.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Admission:
    """Counts requests, and their prompt tokens, from their arrival to their first token.

    Args:
        max_requests, max_tokens: most that may wait. A call that brings more by itself is let in when nobody waits, for
            otherwise it never could be.
        clock: seconds, monotonic.
    """

    def __init__(self, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._clock = clock
        self._waiting: dict[str, int] = {}
        self._started: deque[float] = deque()

    @property
    def num_requests(self) -> int:
        """Requests that wait for their first token."""
        return len(self._waiting)

    def check(self, num_requests: int, num_tokens: int) -> None:
        """Raise ``QueueFullError`` if so much more may not wait."""
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

    def wait(self, request_id: str, num_tokens: int) -> None:
        """The request waits from now on."""
        self._waiting[request_id] = num_tokens
        self.num_tokens += num_tokens

    def start(self, request_id: str) -> None:
        """Its first token is there. Calls for a request that does not wait are ignored."""
        if request_id in self._waiting:
            self.leave(request_id)
            self._started.append(self._clock())
            self._forget_long_ago()

    def leave(self, request_id: str) -> None:
        """It waits no longer, for whatever reason."""
        self.num_tokens -= self._waiting.pop(request_id, 0)

    def _retry_after_s(self) -> int:
        """How long the queue takes to empty at the pace of the last seconds, as far back as anything happened in them."""
        self._forget_long_ago()
        if not self._started:
            return UNKNOWN_RETRY_AFTER_S
        elapsed_s = max(1.0, self._clock() - self._started[0])  # those of one step may all have started just now
        seconds = self.num_requests * elapsed_s / len(self._started)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))

    def _forget_long_ago(self) -> None:
        since_s = self._clock() - RATE_WINDOW_S
        while self._started and self._started[0] < since_s:
            self._started.popleft()


def _requests_are(count: int) -> str:
    return "1 request is" if count == 1 else f"{count} requests are"
