"""Server-sent events: the tokens of one or several requests as they come, and an end whatever happens.

This runs for every token of every client. While a client takes its events slowly, what comes meanwhile is merged by
:meth:`~pagebrain.server.streams.RequestStream.read`; nobody else waits. When the client goes away, its streams are closed at
once, and the engine frees their blocks.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagebrain.outputs import OutputDelta
from pagebrain.server.errors import error_event
from pagebrain.server.streams import RequestStream

logger = logging.getLogger(__name__)

STALL_S = 60.0
"""A client that takes nothing for so long is given up."""

DONE = "data: [DONE]\n\n"
Result = TypeVar("Result")


class Narrator(Protocol):
    """Puts what happens into events. All texts are ASCII."""

    def opening(self) -> str:
        """Events before the first token."""

    def tell(self, prompt_index: int, deltas: list[OutputDelta]) -> str:
        """Events for what a prompt's stream brought; there may be none."""

    def ending(self) -> str:
        """Events after the last token."""


class EventStream(Response):
    """The response that streams ``streams``, one for each prompt of the request, and closes them however it ends.

    Args:
        stall_s: seconds without a byte taken after which the client is given up.
    """

    media_type = "text/event-stream"

    def __init__(self, streams: Sequence[RequestStream], narrator: Narrator, stall_s: float = STALL_S) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._streams = streams
        self._narrator = narrator
        self._stall_s = stall_s
        self._sending_since_s: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; returns when the last event was taken, or the client is gone."""
        self._send = send
        telling = asyncio.ensure_future(self._tell())
        leaving = asyncio.ensure_future(_until_gone(receive))
        done: set[asyncio.Future[None]] = set()
        try:
            while not done and not self._is_stalled():
                done, _ = await asyncio.wait((telling, leaving), timeout=self._stall_s / 4, return_when="FIRST_COMPLETED")
        finally:
            for stream in self._streams:
                stream.close()
            await _cancel(telling, leaving)
        if telling in done:
            telling.result()  # raises what could not be told

    def _is_stalled(self) -> bool:
        stalled = self._sending_since_s is not None and time.monotonic() - self._sending_since_s >= self._stall_s
        if stalled:
            logger.info("a client took nothing for %g seconds and is given up", self._stall_s)
        return stalled

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
            except Exception as error:  # the status is sent: an event must say it
                last = error_event(error)
            await self._write(last, more=False)
        except OSError:  # from sending: the client is gone
            logger.debug("a client went away")

    async def _tell_one(self, stream: RequestStream) -> None:
        while deltas := await stream.read():
            await self._write(self._narrator.tell(0, deltas))

    async def _tell_many(self) -> None:
        """Read all streams at a time, and write what several of them brought in one piece."""
        reads = {asyncio.ensure_future(stream.read()): index for index, stream in enumerate(self._streams)}
        try:
            while reads:
                done, _ = await asyncio.wait(reads, return_when="FIRST_COMPLETED")
                events = []
                for read in sorted(done, key=lambda read: reads[read]):
                    index = reads.pop(read)
                    if deltas := read.result():
                        events.append(self._narrator.tell(index, deltas))
                        reads[asyncio.ensure_future(self._streams[index].read())] = index
                await self._write("".join(events))
        finally:
            await _cancel(*reads)

    async def _write(self, events: str, more: bool = True) -> None:
        if events:
            self._sending_since_s = time.monotonic()
            await self._send({"type": "http.response.body", "body": events.encode("ascii"), "more_body": more})
            self._sending_since_s = None


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def read_all(streams: Sequence[RequestStream], receive: Receive) -> list[list[OutputDelta]]:
    """Each stream to its end; they are closed however that goes. Raises ``ClientGoneError`` if the client leaves first."""
    reads = [asyncio.ensure_future(stream.read_all()) for stream in streams]
    try:
        return await _unless_gone(asyncio.gather(*reads), receive)
    finally:
        for stream in streams:
            stream.close()
        await _cancel(*reads)


async def _unless_gone(work: "asyncio.Future[Result]", receive: Receive) -> Result:
    leaving = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((work, leaving), return_when="FIRST_COMPLETED")
        if not work.done():
            raise ClientGoneError
        return work.result()
    finally:
        await _cancel(work, leaving)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*futures: "asyncio.Future[Any]") -> None:
    """Cancel, and wait until it has happened."""
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)
