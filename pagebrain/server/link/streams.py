"""Streams of the engine's output: the tokens of a request, or the updates of the live view.

All classes belong to the event loop. A write never waits. A read waits for data and returns all of it. The data that waits
for readers is bounded, for each stream and for all streams together.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from pagebrain.errors import PageBrainError
from pagebrain.outputs import OutputDelta, RequestMetrics
from pagebrain.sampling_params import SamplingParams
from pagebrain.server.link.samples import PackedSample
from pagebrain.server.link.scores import Scores

MAX_PENDING_TOKENS = 4096
"""Tokens that may wait for a reader. Beyond this number the stream and its request end."""

DELTA_BYTES = 400
"""Bytes of a waiting delta, without its log-probabilities."""

MAX_PENDING_STEPS = 100
"""Largest number of steps in a live update. Older steps are skipped."""


class DrainingError(PageBrainError):
    """The server is about to end and takes no new requests."""


class SlowReaderError(PageBrainError):
    """A request was ended because its tokens were not read."""


class RequestFailedError(PageBrainError):
    """The engine, or a part of it, failed with this request. Other requests continue."""


class Backlog:
    """The bytes that wait for readers, in all streams together.

    Args:
        max_bytes: the limit. Beyond it the streams with the most bytes end.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._of_streams: dict[RequestStream, int] = {}

    def add(self, stream: "RequestStream", num_bytes: int) -> None:
        """Count more bytes of a stream."""
        self.num_bytes += num_bytes
        self._of_streams[stream] = self._of_streams.get(stream, 0) + num_bytes

    def remove(self, stream: "RequestStream") -> None:
        """Count a stream as empty."""
        self.num_bytes -= self._of_streams.pop(stream, 0)

    def shed(self) -> "list[RequestStream]":
        """End the streams with the most bytes until at most ``max_bytes`` wait. Returns the ended streams."""
        ended = []
        while self.num_bytes > self.max_bytes:
            longest = max(self._of_streams, key=self._of_streams.__getitem__)
            longest.break_off(
                f"{self._of_streams[longest]} bytes were waiting to be read, and {self.num_bytes} for all readers together, "
                f"of at most {self.max_bytes}: read faster"
            )
            ended.append(longest)
        return ended


class RequestStream:
    """The tokens of one request as they come.

    Attributes:
        request_id, prompt_token_ids, params: the request.
        user: the user's name from the client, for the request log.
        secret: a call that aborts the request must give this secret; with ``None`` no call can.
        arrival_s, first_token_s: ``time.monotonic`` seconds.
        num_generated: tokens so far, of all samples.
        is_finished: all samples have ended; there may be data left to read.
        is_broken: the stream ended because it was not read.
        metrics: the engine's times, once finished.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        on_close: "Callable[[RequestStream], None]",
        backlog: Backlog | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.user: str | None = None
        self.secret: str | None = None
        self.arrival_s = time.monotonic()
        self.first_token_s: float | None = None
        self.num_generated = 0
        self.is_finished = False
        self.is_broken = False
        self.metrics: RequestMetrics | None = None
        self._on_close = on_close
        self._backlog = backlog
        self._pending: list[OutputDelta] = []
        self._num_pending = 0
        self._unfinished = set(range(params.n))
        self._last_s: dict[int, float] = {}
        self._error: PageBrainError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    # Reading ----------------------------------------------------------------------------------------------------------

    async def read(self) -> list[OutputDelta]:
        """Wait for data and return all of it, at most one delta for each sample. An empty list is the end.

        Raises ``EngineDeadError``, ``SlowReaderError``, or ``InvalidRequestError`` if the engine refused the request.
        """
        return _merge(await self._take())

    async def read_all(self, use: Callable[[int], None] = lambda num_bytes: None) -> list[OutputDelta]:
        """Read to the end: one delta for each sample, in their order. Raises what :meth:`read` and ``use`` raise.

        ``use`` is called with the number of bytes that each read adds.
        """
        samples = [PackedSample() for _ in range(self.params.n)]
        while pending := await self._take():
            use(sum([samples[delta.index].add(delta) for delta in pending]))
        return [sample.whole(self.request_id, index) for index, sample in enumerate(samples)]

    async def _take(self) -> list[OutputDelta]:
        while not self._pending and self._error is None and not self.is_finished:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pending, self._pending, self._num_pending = self._pending, [], 0
        if self._backlog is not None:
            self._backlog.remove(self)
        if self._error is not None and not pending:
            raise self._error
        return pending

    def close(self) -> None:
        """Stop reading. A request that is under way ends."""
        self._forget()
        self._on_close(self)

    # Writing ----------------------------------------------------------------------------------------------------------

    def put(self, delta: OutputDelta, now_s: float) -> float | None:
        """Add a delta. Returns the seconds since the sample's last token, if there was one."""
        num_tokens = len(delta.token_ids)
        self._pending.append(delta)
        self._num_pending += num_tokens
        self.num_generated += num_tokens
        self.first_token_s = self.first_token_s or now_s
        if delta.finish_reason is not None:
            self._unfinished.discard(delta.index)
            self.is_finished = not self._unfinished
            self.metrics = delta.metrics or self.metrics
        if self._backlog is not None:
            has_scores = delta.logprobs or delta.prompt_logprobs is not None
            self._backlog.add(self, DELTA_BYTES + (_score_bytes(delta) if has_scores else 0))
        if self._num_pending > MAX_PENDING_TOKENS and not self.is_finished:
            self.break_off(f"{self._num_pending} tokens were waiting to be read, {MAX_PENDING_TOKENS} may: read faster")
        self._wake()
        last_s = self._last_s.get(delta.index)
        self._last_s[delta.index] = now_s
        return None if last_s is None else now_s - last_s

    def break_off(self, why: str) -> None:
        """Drop the waiting data. The reader gets a ``SlowReaderError``."""
        self.is_broken = True
        self._forget()
        self._error = SlowReaderError(why)
        self._wake()

    def _forget(self) -> None:
        self._pending.clear()
        if self._backlog is not None:
            self._backlog.remove(self)

    def abort(self) -> None:
        """End all unfinished samples with the finish reason ``abort``."""
        for index in sorted(self._unfinished):
            self._pending.append(OutputDelta(self.request_id, index, "", (), finish_reason="abort"))
        self._unfinished.clear()
        self.is_finished = True
        self._wake()

    def fail(self, error: PageBrainError) -> None:
        """End the request with an error. :meth:`read` returns the waiting data, and then raises the error."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merge(pending: list[OutputDelta]) -> list[OutputDelta]:
    """One delta for each sample, in the order of the samples."""
    if len(pending) == 1:  # the usual case
        return pending
    by_index: dict[int, list[OutputDelta]] = {}
    for delta in pending:
        by_index.setdefault(delta.index, []).append(delta)
    return [_joined(pieces) for _, pieces in sorted(by_index.items())]


def _joined(pieces: list[OutputDelta]) -> OutputDelta:
    first, last = pieces[0], pieces[-1]
    return OutputDelta(
        request_id=first.request_id,
        index=first.index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        logprobs=Scores.joined([piece.logprobs for piece in pieces]),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None), None),
        metrics=last.metrics,
    )


def _score_bytes(delta: OutputDelta) -> int:
    return sum(len(scores.data) for scores in (delta.logprobs, delta.prompt_logprobs) if isinstance(scores, Scores))


class LiveSubscription:
    """The updates of the live view, for one reader. Updates that wait are merged: newest state, all steps."""

    def __init__(self, on_close: "Callable[[LiveSubscription], None]") -> None:
        self._on_close = on_close
        self._update: dict[str, Any] | None = None
        self._ended = False
        self._news = asyncio.Event()

    def put(self, update: dict[str, Any]) -> None:
        """Add an update."""
        if self._update is not None:
            steps = self._update["steps"] + update["steps"]
            skipped = self._update["skipped"] + update["skipped"] + max(0, len(steps) - MAX_PENDING_STEPS)
            update = update | {"steps": steps[-MAX_PENDING_STEPS:], "skipped": skipped}
        self._update = update
        self._news.set()

    def end(self) -> None:
        """End the updates."""
        self._ended = True
        self._news.set()

    def close(self) -> None:
        """Stop reading."""
        on_close, self._on_close = self._on_close, _nothing
        on_close(self)

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        while True:
            await self._news.wait()
            self._news.clear()
            update, self._update = self._update, None
            if update is not None:
                yield update
            if self._ended:
                return


def _nothing(subscription: LiveSubscription) -> None:
    """Called if a subscription is closed twice."""
