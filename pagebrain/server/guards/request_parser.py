"""From the bytes of a connection to requests: llhttp's parser (``httptools``) behind limits that act while bytes still come.

What stands before a request's body is kept in memory, and is read before any key is checked. So its parts have limits, as in
servers that usually stand in front. Offers to change the protocol (``Upgrade``) are ignored, as HTTP allows: llhttp takes
what follows such a head for another protocol, so the head is given to it again without the offer. Two kinds of clients send
such an offer with every first POST: Java's ``HttpClient`` and ``curl --http2``.
"""

import urllib.parse
from dataclasses import dataclass
from typing import Protocol

import httptools

from pagebrain.server.error_responses import ApiError

MAX_TARGET_BYTES = 8192
"""Longest path with its query."""

MAX_HEADERS = 100
"""Most header lines of a request, trailers included."""

MAX_HEADER_BYTES = 16_384
"""Longest header line; also most bytes in a row that are part of no body and end nothing, such as a chunk's extension."""

MAX_HEAD_BYTES = 65_536
"""Most bytes of all header lines of a request, trailers included."""

VERSIONS = ("1.0", "1.1")


@dataclass(frozen=True)
class RequestHead:
    """What stands before a request's body.

    Attributes:
        raw_path, path: as it was sent, and as text with its ``%`` escapes read.
        version: ``1.0`` or ``1.1``.
        headers: names in lower case. There is no ``upgrade``.
        keeps_alive: the client is ready to use the connection again.
    """

    method: str
    raw_path: bytes
    path: str
    query: bytes
    version: str
    headers: list[tuple[bytes, bytes]]
    keeps_alive: bool


class RequestReceiver(Protocol):
    """What :class:`RequestParser` calls. An ``ApiError`` that is raised here comes out of :meth:`RequestParser.feed`."""

    def on_request_begun(self) -> None:
        """The first byte of a request came; may be called again before its head is whole."""

    def on_request_head(self, head: RequestHead) -> None:
        """The head is whole."""

    def on_request_body(self, piece: bytes) -> None:
        """Some of the body came."""

    def on_request_end(self) -> None:
        """The request is whole."""


class RequestParser:
    """Reads the requests of one connection. After an error it can read no more."""

    def __init__(self, receiver: RequestReceiver) -> None:
        self._receiver = receiver
        self._parser = httptools.HttpRequestParser(self)
        self._heard = False  # whether llhttp has called back since the last feed
        self._num_unheard = 0
        self._start_request()

    def _start_request(self) -> None:
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._num_headers = 0
        self._num_bytes = 0
        self._in_head = True
        self._has_offer = False

    @property
    def version(self) -> str:
        """In which version to answer the request that is being read, as far as it is known."""
        return "1.0" if self._parser.get_http_version() == "1.0" else "1.1"

    def feed(self, data: bytes) -> None:
        """Read on. Raises ``ApiError`` for what is not HTTP, or over a limit."""
        for start in range(0, len(data), MAX_HEADER_BYTES):
            self._feed_some(data[start : start + MAX_HEADER_BYTES])

    def _feed_some(self, data: bytes) -> None:
        self._heard = False
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            raise error.__context__ or self._not_http(error) from None  # the former if it came out of a callback
        # llhttp says nothing of a header before its end. So bytes without a word from it all belong to the same thing.
        self._num_unheard = 0 if self._heard else self._num_unheard + len(data)
        if self._num_unheard > MAX_HEADER_BYTES:
            raise _too_large(f"a header line is longer than {MAX_HEADER_BYTES} bytes")

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = self._head_without_offer() + data[offer.args[0] :]
                self._parser = httptools.HttpRequestParser(self)

    def _head_without_offer(self) -> bytes:
        lines = [b"%b %b HTTP/%b" % (self._parser.get_method(), self._target, self.version.encode())]
        lines += [b"%b: %b" % header for header in self._headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _not_http(self, error: Exception) -> ApiError:
        if self._in_head and self._parser.get_method() == b"PRI":
            return _wrong_version("2")
        if "version" in f"{error}":
            return _wrong_version("of this version")
        return ApiError(400, f"this is no HTTP request: {error}", code="invalid_http")

    # Called by httptools ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._heard = True
        self._start_request()
        self._receiver.on_request_begun()

    def on_url(self, piece: bytes) -> None:
        """Some of the path and query."""
        self._heard = True
        self._target += piece
        if len(self._target) > MAX_TARGET_BYTES:
            message = f"the path with its query is longer than {MAX_TARGET_BYTES} bytes: send what is long in a body"
            raise ApiError(414, message, code="path_too_long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line, or a trailer: nothing here reads trailers, and none may pass for a header."""
        self._heard = True
        num_bytes = len(name) + len(value) + 4
        self._num_headers += 1
        self._num_bytes += num_bytes
        if self._num_headers > MAX_HEADERS:
            raise _too_large(f"the request has more than {MAX_HEADERS} header lines")
        if num_bytes > MAX_HEADER_BYTES:
            raise _too_large(f"a header line is longer than {MAX_HEADER_BYTES} bytes")
        if self._num_bytes > MAX_HEAD_BYTES:
            raise _too_large(f"all header lines together are longer than {MAX_HEAD_BYTES} bytes")
        if self._in_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """A body may follow."""
        self._heard, self._in_head = True, False
        version = self._parser.get_http_version()
        method = self._parser.get_method().decode("ascii")
        if version not in VERSIONS:
            raise _wrong_version(version)
        if method == "CONNECT":
            raise ApiError(405, "this server is no proxy: CONNECT is not served", headers={"Allow": "GET, POST"})
        if self._parser.should_upgrade():
            self._has_offer = True
            return
        raw_path, query = _split(self._target)
        head = RequestHead(
            method=method,
            raw_path=raw_path,
            path=urllib.parse.unquote(raw_path.decode("latin-1")),
            query=query,
            version=version,
            headers=self._headers,
            keeps_alive=self._parser.should_keep_alive(),
        )
        self._receiver.on_request_head(head)

    def on_chunk_header(self) -> None:
        """A chunk of the body begins."""
        self._heard = True

    def on_body(self, piece: bytes) -> None:
        """Some of the body."""
        self._heard = True
        self._receiver.on_request_body(piece)

    def on_message_complete(self) -> None:
        """The request has ended, unless its head is still to be given to llhttp again."""
        self._heard = True
        if not self._has_offer:
            self._receiver.on_request_end()


def _split(target: bytes) -> tuple[bytes, bytes]:
    """The path and the query. The target of a request that was meant for a proxy begins with a scheme and a host."""
    if target == b"*":
        return target, b""
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserError:
        raise ApiError(400, "the request's path cannot be read", code="invalid_http") from None
    return url.path or b"/", url.query or b""


def _too_large(what: str) -> ApiError:
    return ApiError(431, f"{what}: send less", code="headers_too_large")


def _wrong_version(version: str) -> ApiError:
    return ApiError(505, f"HTTP {version} is not served: use HTTP/1.1", code="http_version_not_supported")
