"""What asyncio does not tell of a connection's socket, and the system does."""

import asyncio
import contextlib
import os
import select
import socket
import struct
import sys


def num_unsent(transport: asyncio.Transport) -> int:
    """Bytes that this machine's system holds for a client, megabytes perhaps; 0 where it does not say."""
    if sys.platform != "linux":
        return 0
    import fcntl
    import termios

    with contextlib.suppress(OSError):
        answer = fcntl.ioctl(_descriptor(transport), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(answer, sys.byteorder)
    return 0


def is_readable(transport: asyncio.Transport) -> bool:
    """Whether something has come that was not read yet."""
    descriptor = _descriptor(transport)
    if descriptor < 0:
        return False
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([descriptor], [], [], 0)[0])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def reset(transport: asyncio.Transport) -> None:
    """End a connection with a reset: what the system holds for the client is freed, and no part can pass for the whole."""
    linger = struct.pack("ii" if os.name == "posix" else "hh", 1, 0)
    with contextlib.suppress(OSError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def _descriptor(transport: asyncio.Transport) -> int:
    return int(transport.get_extra_info("socket").fileno())
