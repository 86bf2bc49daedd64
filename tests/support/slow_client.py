"""A client on a bare socket that takes from a stream as much as a test wants it to, and no more."""

import io
import json
import socket
import time
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

WINDOW_BYTES = 1024
"""Of the client's buffer. The system makes it a little larger, and keeps a megabyte or so on the server's side."""


class SlowClient:
    """Has posted a JSON body to a path, and ``more`` behind it. Use as a context; at its end it hangs up.

    Attributes:
        got: what it has taken of the response, headers included.
    """

    def __init__(self, url: str, path: str, body: dict[str, Any], more: bytes = b"") -> None:
        self.got = b""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW_BYTES)
        self._socket.settimeout(60)
        parts = urlsplit(url)
        self._socket.connect((parts.hostname, parts.port))
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        head += "" if more else "Connection: close\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content + more)

    def take(self, max_bytes: int = 4096) -> bool:
        """Wait for some bytes; false at the end."""
        new = self._socket.recv(max_bytes)
        self.got += new
        return bool(new)

    def trickle(self, seconds: float) -> None:
        """Take a little, again and again, for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.take(512):
            time.sleep(0.05)

    def take_all(self) -> str:
        """Take everything that comes, as fast as it comes; returns the whole response, which may have broken off."""
        try:
            while self.take(1 << 20):
                pass
        except ConnectionError:
            pass
        return self.got.decode()

    def take_body(self) -> bytes:
        """Take everything that comes; returns the whole body without the framing of its chunks.

        Raises ``http.client.IncompleteRead`` if it broke off.
        """
        self.take_all()
        response = HTTPResponse(_Received(self.got))  # type: ignore[arg-type]  # it asks for a file, and nothing else
        response.begin()
        return response.read()

    def hang_up(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> "SlowClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()


class _Received:
    """The bytes of a response, where ``http.client`` expects a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)
