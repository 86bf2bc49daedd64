"""System calls on a connection's socket that asyncio does not offer."""

import asyncio
import contextlib
import os
import select
import socket
import struct
import sys


def num_unsent(transport: asyncio.Transport) -> int:
    """Bytes in the system's send buffer, perhaps megabytes; 0 if the system does not tell."""
    if sys.platform != "linux":
        return 0
    import fcntl
    import termios

    with contextlib.suppress(OSError):
        answer = fcntl.ioctl(_descriptor(transport), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(answer, sys.byteorder)
    return 0


def is_readable(transport: asyncio.Transport) -> bool:
    """Whether received data waits to be read."""
    descriptor = _descriptor(transport)
    if descriptor < 0:
        return False
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([descriptor], [], [], 0)[0])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def reset(transport: asyncio.Transport) -> None:
    """Close a connection with a reset. Unsent data is dropped, and the client cannot take a part for the whole answer."""
    linger = struct.pack("ii" if os.name == "posix" else "hh", 1, 0)
    with contextlib.suppress(OSError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def _descriptor(transport: asyncio.Transport) -> int:
    return int(transport.get_extra_info("socket").fileno())
