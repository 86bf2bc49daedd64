"""The standard streams of a process whose work must not depend on them.

What a process says on standard error is never its purpose. If it cannot be written, it is dropped and counted, and the work
goes on. A process that serves does not wait for a slow reader either: a thread writes for it. The standard output of a
command that prints results stays as it is: there a closed pipe ends the command, as with other Unix tools.
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
"""What may wait for the writing thread; it is some ten thousand lines."""

EXIT_S = 2.0
"""How long the end of a process may wait for its last lines to be written."""


class UnfailingFile(io.RawIOBase):
    """The raw side of a text stream: writes to a descriptor, and drops and counts what cannot be written.

    Args:
        fd: the descriptor; it is not closed here.
        max_queued_bytes: most that may wait once :meth:`queue` was called.

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
        self._num_untold = 0  # of the lines lost, those that no note tells of yet
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: "Buffer", /) -> int:
        """Take all of ``data``. Never fails; after :meth:`queue` it never waits either."""
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
        """From now on a thread writes, in order, and :meth:`write` only queues."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_queued, name=f"pagebrain-writer-{self._fd}", daemon=True)
            self._writer.start()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued, no longer than ``timeout_s``; returns whether that is so."""
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
        except OSError:  # nobody reads it any more, the disk is full, the terminal has gone
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
        except BlockingIOError:  # whoever shares the descriptor has made it so
            select.select([], [fd], [])


@contextlib.contextmanager
def unfailing_stderr() -> Iterator[None]:
    """Within the block, what cannot be written to standard error is dropped. A stream that a test has put there stays."""
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
    """For a process that serves: from now on threads write what it says on standard output and standard error."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is getattr(sys, f"__{name}__"):
            setattr(sys, name, _unfailing(fd, before))
        file = _own_file(getattr(sys, name))
        if file is not None:
            file.queue()


def drain_output(timeout_s: float = EXIT_S) -> None:
    """Wait until what was queued is written, no longer than ``timeout_s``."""
    until = time.monotonic() + timeout_s
    for stream in (sys.stdout, sys.stderr):
        file = _own_file(stream)
        if file is not None:
            stream.flush()  # a line without its end
            file.drain(max(0.0, until - time.monotonic()))


def reserve_descriptors() -> None:
    """Open descriptors 0 to 2 where they are closed, so that no socket or file of this process gets one of these numbers.

    Libraries write to them, and libuv aborts the process when it closes one. They lead nowhere: input is empty, and
    output goes nowhere.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            os.set_inheritable(fd, True)  # child processes need it for the same reason
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # print() to None would print to the other one
            for attribute in (name, f"__{name}__"):
                setattr(sys, attribute, _text(io.FileIO(fd, "w", closefd=False), "utf-8"))


def _unfailing(fd: int, before: TextIO | None) -> io.TextIOWrapper:
    return _text(UnfailingFile(fd), "utf-8" if before is None else before.encoding)


def _text(file: io.RawIOBase, encoding: str) -> io.TextIOWrapper:
    """A text stream that passes on whole lines."""
    return io.TextIOWrapper(io.BufferedWriter(file), encoding=encoding, errors="backslashreplace", line_buffering=True)


def _own_file(stream: TextIO | None) -> UnfailingFile | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, UnfailingFile) else None
