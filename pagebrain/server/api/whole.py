"""Answers in one piece: read to their end, then written as JSON while the client takes them.

What is held until then is packed, and less than the JSON; see :mod:`pagebrain.server.api.held`. The JSON exists a chunk at a
time, so neither a big answer nor a slow client costs more than that.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagebrain.outputs import OutputDelta
from pagebrain.server.api.heavy import CHUNK_BYTES, later_chunk, next_chunk
from pagebrain.server.api.held import Hold
from pagebrain.server.api.sse import ClientGoneError, read_all, while_there
from pagebrain.server.link.streams import RequestStream

Answers = list[list[OutputDelta]]
"""For each prompt its samples, each whole."""


class JsonAnswer(Response):
    """The response that writes JSON while it sends it.

    Args:
        pieces: of the JSON text, in ASCII.
        hold: the room that the answer takes; it is given back however this ends.
    """

    media_type = "application/json"

    def __init__(self, pieces: Iterator[str], hold: Hold) -> None:
        super().__init__()
        self._pieces = pieces
        self._hold = hold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; returns when the last chunk was handed over, or the client is gone."""
        try:
            await self._send(self._pieces, scope, receive, send)
        finally:
            self._hold.close()

    async def _send(self, pieces: Iterator[str], scope: Scope, receive: Receive, send: Send) -> None:
        chunk = next_chunk(pieces)
        if len(chunk) < CHUNK_BYTES:
            await Response(chunk, media_type=self.media_type)(scope, receive, send)
            return
        await while_there(self._send_chunks(chunk, pieces, send), receive)

    async def _send_chunks(self, chunk: bytes, pieces: Iterator[str], send: Send) -> None:
        headers = [(b"content-type", b"application/json")]  # its length is not known yet
        with contextlib.suppress(OSError):  # from sending: the client is gone
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = await later_chunk(pieces)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class WholeAnswer(JsonAnswer):
    """The response that reads ``streams``, one for each prompt of the request, to their ends, and answers then.

    Args:
        hold: the room that was reserved for it.
        write: makes the pieces of the JSON text. It may empty the lists that it gets, so that what was written is dropped.
            Raises, before there is any piece, if the answer is not complete.
    """

    def __init__(
        self,
        streams: Sequence[RequestStream],
        hold: Hold,
        write: Callable[[Answers], Iterator[str]],
    ) -> None:
        super().__init__(iter(()), hold)
        self._streams = streams
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises what reading a stream raises, before anything was sent."""
        try:
            try:
                answers = await read_all(self._streams, receive, self._hold.use)
            except ClientGoneError:
                await Response(status_code=499)(scope, receive, send)
                return
            self._hold.fit()
            await self._send(self._write(answers), scope, receive, send)
        finally:
            self._hold.close()
