"""Answers in one piece: read completely, then written as JSON in chunks while they are sent.

The held data is packed, and smaller than its JSON: see :mod:`pagebrain.server.api.held`. Only one chunk of JSON exists at a
time, also for a big answer or a slow client.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagebrain.outputs import OutputDelta
from pagebrain.server.api.heavy import CHUNK_BYTES, later_chunk, next_chunk
from pagebrain.server.api.held import Hold
from pagebrain.server.api.sse import read_all, while_there
from pagebrain.server.link.streams import RequestStream

Answers = list[list[OutputDelta]]
"""For each prompt its samples, each complete."""


class JsonAnswer(Response):
    """The response that writes JSON while it is sent.

    Args:
        pieces: the JSON text in ASCII, in pieces.
        hold: the memory reserved for the answer. It is always closed.
    """

    media_type = "application/json"

    def __init__(self, pieces: Iterator[str], hold: Hold) -> None:
        super().__init__()
        self._pieces = pieces
        self._hold = hold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. Returns when the last chunk was sent or the client has disconnected."""
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
        headers = [(b"content-type", b"application/json")]  # no content-length: it is not known yet
        with contextlib.suppress(OSError):  # from sending: the client has disconnected
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = await later_chunk(pieces)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class WholeAnswer(JsonAnswer):
    """The response that reads ``streams``, one for each prompt of the request, to their ends before it answers.

    Args:
        hold: the memory reserved for the answer.
        write: makes the pieces of the JSON text. It may remove samples from the lists when they are written.
            It raises before the first piece if the answer is not complete.
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
        """Send the response. Raises what reading a stream raises, before anything was sent."""
        try:
            answers = await read_all(self._streams, receive, self._hold.use)
            if answers is None:
                await Response(status_code=499)(scope, receive, send)
                return
            self._hold.fit()
            await self._send(self._write(answers), scope, receive, send)
        finally:
            self._hold.close()
