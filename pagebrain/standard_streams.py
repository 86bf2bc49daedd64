"""Standard streams that cannot fail or block a process.

Output on standard error is not essential. If it cannot be written, it is dropped and counted, and the process continues. A
server does not wait for a slow reader either: a thread writes its output. The standard output of a command that prints
results is not changed: there a closed pipe ends the command, as with other Unix tools.
"""

import contextlib
import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_QUEUED_BYTES = 4 * 2**20
"""Most bytes that wait for the writing thread: some ten thousand lines."""

EXIT_S = 2.0
"""Seconds that a process waits at its end until its last lines are written."""


class UnfailingFile(io.RawIOBase):
    """The raw side of a text stream. It writes to a descriptor, and drops and counts lines that cannot be written.

    Args:
        fd: the descriptor; it is not closed here.
        max_queued_bytes: most bytes that may wait after :meth:`queue` was called.

    Attributes:
        num_lost: lines that could not be written so far.
    """

    def __init__(self, fd: int, max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        super().__init__()
        self.num_lost = 0
        self._fd = fd
        self._max_queued_bytes = max_queued_bytes
        self._chunks: deque[bytes] = deque()
        self._num_queued_bytes = 0
        self._num_untold = 0  # lost lines that no note has reported yet
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Whether the descriptor is a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """Always true."""
        return True

    def write(self, data: "Buffer", /) -> int:
        """Accept all of ``data``. Never fails; after :meth:`queue` it never waits either."""
        chunk = bytes(data)
        if self._writer is None:
            self._write_now(chunk)
            return len(chunk)
        with self._changed:
            if self._num_queued_bytes + len(chunk) > self._max_queued_bytes:
                self._lose(chunk)
            else:
                self._chunks.append(chunk)
                self._num_queued_bytes += len(chunk)
                self._changed.notify_all()
        return len(chunk)

    def queue(self) -> None:
        """Start a thread that writes in order. From now on :meth:`write` only queues."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_queued, name=f"pagebrain-writer-{self._fd}", daemon=True)
            self._writer.start()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued, at most ``timeout_s``. Returns whether the queue is empty."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_queued_bytes, timeout_s)

    def _write_queued(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._chunks))
                chunk = self._chunks.popleft()
            self._write_now(chunk)
            with self._changed:
                self._num_queued_bytes -= len(chunk)
                self._changed.notify_all()

    def _write_now(self, chunk: bytes) -> None:
        told = self._num_untold
        note = f"pagebrain: warning: lines that could not be written here and are lost: {told}\n".encode() if told else b""
        try:
            _write_all(self._fd, note + chunk)
        except OSError:  # the reader has closed the pipe, the disk is full, or the terminal has gone
            with self._changed:
                self._lose(chunk)
        else:
            with self._changed:
                self._num_untold -= told

    def _lose(self, chunk: bytes) -> None:
        lines = chunk.count(b"\n")
        self.num_lost += lines
        self._num_untold += lines


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:  # another process that shares the descriptor has made it non-blocking
            select.select([], [fd], [])


@contextlib.contextmanager
def unfailing_stderr() -> Iterator[None]:
    """Within the block, output that cannot be written to standard error is dropped. A replaced ``sys.stderr`` is kept."""
    before = sys.stderr
    if before is not sys.__stderr__:
        yield
        return
    sys.stderr = _unfailing(2, before)
    try:
        yield
    finally:
        drain_output()
        sys.stderr = before


def queue_output() -> None:
    """For a server: from now on threads write its standard output and standard error."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is getattr(sys, f"__{name}__"):
            setattr(sys, name, _unfailing(fd, before))
        file = _own_file(getattr(sys, name))
        if file is not None:
            file.queue()


def drain_output(timeout_s: float = EXIT_S) -> None:
    """Wait until all queued output is written, at most ``timeout_s``."""
    until = time.monotonic() + timeout_s
    for stream in (sys.stdout, sys.stderr):
        file = _own_file(stream)
        if file is not None:
            stream.flush()  # an incomplete line
            file.drain(max(0.0, until - time.monotonic()))


def reserve_descriptors() -> None:
    """Open descriptors 0 to 2 to the null device if they are closed, so that no socket or file gets one of these numbers.

    Libraries write to these numbers, and libuv aborts the process when it closes one of them.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(fd, True)  # child processes need it for the same reason
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # otherwise print(file=None) would write to the other stream
            for attribute in (name, f"__{name}__"):
                setattr(sys, attribute, _text(io.FileIO(fd, "w", closefd=False), "utf-8"))


def _unfailing(fd: int, before: TextIO | None) -> io.TextIOWrapper:
    return _text(UnfailingFile(fd), "utf-8" if before is None else before.encoding)


def _text(file: io.RawIOBase, encoding: str) -> io.TextIOWrapper:
    """A line-buffered text stream."""
    return io.TextIOWrapper(io.BufferedWriter(file), encoding=encoding, errors="backslashreplace", line_buffering=True)


def _own_file(stream: TextIO | None) -> UnfailingFile | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, UnfailingFile) else None
