"""Parses the bytes of a connection into requests with llhttp (``httptools``). Limits are checked while bytes arrive.

A request's head (all before its body) is kept in memory and is read before the API key is checked. So its parts are limited,
as in reverse proxies. Offers to change the protocol (``Upgrade``) are ignored, as HTTP allows; Java's ``HttpClient`` and
``curl --http2`` send one with their first POST. llhttp reads what follows such a head as another protocol, so the head is
parsed again without the offer.
"""

import urllib.parse
from dataclasses import dataclass
from typing import Protocol

import httptools

from pagebrain.server.error_responses import ApiError

MAX_TARGET_BYTES = 8192
"""Longest path and query together."""

MAX_HEADERS = 100
"""Most header lines of a request, trailers included."""

MAX_HEADER_BYTES = 16_384
"""Longest header line. Also the limit for other long parts outside a body, such as a chunk's extension."""

MAX_HEAD_BYTES = 65_536
"""Most bytes of all header lines of a request, trailers included."""

VERSIONS = ("1.0", "1.1")


@dataclass(frozen=True)
class RequestHead:
    """The request line and the headers.

    Attributes:
        raw_path, path: as sent, and as text with its ``%`` escapes decoded.
        version: ``1.0`` or ``1.1``.
        headers: names in lower case, without ``upgrade``.
        keeps_alive: the client may use the connection again.
    """

    method: str
    raw_path: bytes
    path: str
    query: bytes
    version: str
    headers: list[tuple[bytes, bytes]]
    keeps_alive: bool


class RequestReceiver(Protocol):
    """What :class:`RequestParser` calls. :meth:`RequestParser.feed` passes on an ``ApiError`` that is raised here."""

    def on_request_begun(self) -> None:
        """A request has begun. May be called again before its head is complete."""

    def on_request_head(self, head: RequestHead) -> None:
        """The head is complete."""

    def on_request_body(self, piece: bytes) -> None:
        """A piece of the body has arrived."""

    def on_request_end(self) -> None:
        """The request is complete."""


class RequestParser:
    """Parses the requests of one connection. Cannot be used after an error."""

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
        """The HTTP version for the answer to the current request."""
        return "1.0" if self._parser.get_http_version() == "1.0" else "1.1"

    def feed(self, data: bytes) -> None:
        """Parse ``data``. Raises ``ApiError`` if it is not HTTP or over a limit."""
        for start in range(0, len(data), MAX_HEADER_BYTES):
            self._feed_some(data[start : start + MAX_HEADER_BYTES])

    def _feed_some(self, data: bytes) -> None:
        self._heard = False
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            raise error.__context__ or self._not_http(error) from None  # __context__: the exception of a callback
        # llhttp calls back at the end of each part. So bytes without a callback all belong to one part.
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
        return ApiError(400, f"this is not an HTTP request: {error}", code="invalid_http")

    # Called by httptools ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request has begun."""
        self._heard = True
        self._start_request()
        self._receiver.on_request_begun()

    def on_url(self, piece: bytes) -> None:
        """A piece of the path and query. Raises ``ApiError`` (414)."""
        self._heard = True
        self._target += piece
        if len(self._target) > MAX_TARGET_BYTES:
            message = f"the path with its query is longer than {MAX_TARGET_BYTES} bytes: send long data in the body"
            raise ApiError(414, message, code="path_too_long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line, or a trailer. Both are counted; trailers are dropped. Raises ``ApiError`` (431)."""
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
        """The head is complete. Raises ``ApiError`` for a version or method that is not served."""
        self._heard, self._in_head = True, False
        version = self._parser.get_http_version()
        method = self._parser.get_method().decode("ascii")
        if version not in VERSIONS:
            raise _wrong_version(version)
        if method == "CONNECT":
            raise ApiError(405, "this server is not a proxy: CONNECT is not served", headers={"Allow": "GET, POST"})
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
        """A chunk of the body has begun."""
        self._heard = True

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        self._heard = True
        self._receiver.on_request_body(piece)

    def on_message_complete(self) -> None:
        """The request is complete, unless its head is parsed again without an offer."""
        self._heard = True
        if not self._has_offer:
            self._receiver.on_request_end()


def _split(target: bytes) -> tuple[bytes, bytes]:
    """The path and the query. The target of a request to a proxy begins with a scheme and a host, which are dropped."""
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
