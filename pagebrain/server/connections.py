"""Connections that send nothing are given up: uvicorn waits for a request's headers for ever."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_S = 30.0
"""How long a connection may take to send the headers of its first request, or of the next one."""


class PunctualProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a deadline for headers. What a body may take is up to ``body_guard.py``."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request is expected."""
        super().connection_made(transport)
        self._expect_headers()

    def on_response_complete(self) -> None:
        """The next request is expected."""
        super().on_response_complete()
        self._deadline.cancel()
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._deadline = self.loop.call_later(HEADERS_S, self._give_up)

    def _give_up(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering and not self.transport.is_closing():
            self.transport.close()
