"""Server-sent events: the tokens of one or several streams as they come. A stream always ends with a last event.

This runs for every token of every client. For a slow client, new tokens are merged by
:meth:`~pagebrain.server.link.streams.RequestStream.read`, and no other client waits. Long events are written while they are
sent. When the client disconnects, its streams are closed at once, and the engine frees their blocks. A client that receives
nothing for a long time is disconnected, see :mod:`pagebrain.server.guards.connections`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagebrain.outputs import OutputDelta
from pagebrain.server.api.heavy import CHUNK_BYTES, later_chunk, next_chunk
from pagebrain.server.error_responses import error_event
from pagebrain.server.link.streams import RequestStream

logger = logging.getLogger(__name__)

CANCEL_AGAIN_S = 0.1

DONE = "data: [DONE]\n\n"
Result = TypeVar("Result")


class Narrator(Protocol):
    """Writes the events of one answer format, in ASCII."""

    def opening(self) -> str:
        """Events before the first token."""

    def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str | Iterator[str]:
        """Events for a prompt's deltas; may be empty. An iterator of pieces if they may be long."""

    def ending(self) -> str:
        """Events after the last token."""


class EventStream(Response):
    """The response that sends the tokens of ``streams``, one for each prompt of the request, and then closes them."""

    media_type = "text/event-stream"

    def __init__(self, streams: Sequence[RequestStream], narrator: Narrator) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._streams = streams
        self._narrator = narrator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. Returns when the last event was sent or the client has disconnected."""
        self._send = send
        try:
            await while_there(self._tell(), receive)
        finally:
            for stream in self._streams:
                stream.close()

    async def _tell(self) -> None:
        try:
            await self._send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await self._write(self._narrator.opening())
                if len(self._streams) == 1:
                    await self._tell_one(self._streams[0])
                else:
                    await self._tell_many()
                last = self._narrator.ending()
            except OSError:
                raise
            except Exception as error:  # the status was sent already, so the error is an event
                last = error_event(error)
            await self._write(last, more=False)
        except OSError:  # from sending: the client has disconnected
            logger.debug("a client disconnected")

    async def _tell_one(self, stream: RequestStream) -> None:
        while deltas := await stream.read():
            await self._write(self._narrator.tell(0, deltas))

    async def _tell_many(self) -> None:
        """Read all streams at once. Events of streams that are ready together are sent together."""
        reads = {asyncio.ensure_future(stream.read()): index for index, stream in enumerate(self._streams)}
        try:
            while reads:
                done, _ = await asyncio.wait(reads, return_when="FIRST_COMPLETED")
                news = []
                for read in sorted(done, key=lambda read: reads[read]):
                    index = reads.pop(read)
                    if deltas := read.result():
                        news.append((index, deltas))
                        reads[asyncio.ensure_future(self._streams[index].read())] = index
                told = [self._narrator.tell(index, deltas) for index, deltas in news]
                await self._write(chain.from_iterable([events] if isinstance(events, str) else events for events in told))
        finally:
            await _cancel(*reads)

    async def _write(self, events: str | Iterator[str], more: bool = True) -> None:
        if isinstance(events, str):
            if events:
                await self._send({"type": "http.response.body", "body": events.encode("ascii"), "more_body": more})
            return
        chunk = next_chunk(events)
        while chunk:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": more})
            chunk = await later_chunk(events) if len(chunk) >= CHUNK_BYTES else b""


async def while_there(work: Awaitable[Result], receive: Receive) -> Result | None:
    """The result of ``work``, or ``None`` if the client disconnects first: ``work`` is then cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when="FIRST_COMPLETED")
        return working.result() if working.done() else None
    finally:
        await _cancel(working, leaving)


async def read_all(
    streams: Sequence[RequestStream], receive: Receive, use: Callable[[int], None]
) -> list[list[OutputDelta]] | None:
    """All deltas of each stream, or ``None`` if the client disconnects first. The streams are closed in every case.

    ``use`` is called with the number of bytes that each read adds to the held answer; its exceptions are passed on.
    """
    reads = [asyncio.ensure_future(stream.read_all(use)) for stream in streams]
    try:
        return await while_there(asyncio.gather(*reads), receive)
    finally:
        for stream in streams:
            stream.close()
        await _cancel(*reads)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*futures: "asyncio.Future[Any]") -> None:
    """Cancel, and wait until all have ended.

    Cancelling is repeated: before Python 3.12 ``asyncio.wait_for`` loses a cancellation that comes together with the result
    that it waits for.
    """
    left = {future for future in futures if not future.done()}
    while left:
        for future in left:
            future.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*futures, return_exceptions=True)
