"""Work that is too long for the event loop: reading big bodies, and writing big answers as JSON.

Big bodies are read in a thread, one after the other. It is Python's own work, so the thread gives the event loop its turns
and makes nothing faster. An answer is written on the event loop, a chunk at a time: each takes a few milliseconds, and no
more than one of them is written in a turn of the loop, whatever the number of answers.
"""

import asyncio
import json
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

CHUNK_BYTES = 2**16
"""An answer that is longer is sent in chunks of about so much."""

NUM_AT_A_TIME = 32
"""Tokens whose log-probabilities are written as JSON by one call; with 21 each that takes a millisecond or two."""

NUM_CHARACTERS = 2**14
"""Characters of a string that are written as JSON by one call."""

Result = TypeVar("Result")

_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pagebrain-heavy")
_turns: "WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]" = WeakKeyDictionary()
encode_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


async def in_turn(function: Callable[..., Result], *args: Any) -> Result:
    """What ``function`` returns, called in the thread when those before it are done."""
    return await asyncio.get_running_loop().run_in_executor(_thread, function, *args)


def next_chunk(pieces: Iterator[str]) -> bytes:
    """The next of the pieces together, at least ``CHUNK_BYTES`` of ASCII text if there are as many; empty at the end."""
    taken: list[str] = []
    num_bytes = 0
    for piece in pieces:
        taken.append(piece)
        num_bytes += len(piece)
        if num_bytes >= CHUNK_BYTES:
            break
    return "".join(taken).encode("ascii")


async def later_chunk(pieces: Iterator[str]) -> bytes:
    """The same when the event loop has had a turn, and other answers theirs."""
    async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        await asyncio.sleep(0)
        return next_chunk(pieces)


def json_pieces(value: dict[str, Any]) -> Iterator[str]:
    """The JSON of an object, in pieces that take few milliseconds each: members may be long strings or lists of numbers."""
    separator = "{"
    for name, member in value.items():
        yield f"{separator}{encode_json(name)}:"
        if isinstance(member, str):
            yield from string_pieces(member)
        elif isinstance(member, array | list):
            yield from _list_pieces(member)
        else:
            yield encode_json(member)
        separator = ","
    yield "}"


def string_pieces(text: str) -> Iterator[str]:
    """The JSON of a string, in pieces."""
    yield '"'
    for start in range(0, len(text), NUM_CHARACTERS):
        yield encode_json(text[start : start + NUM_CHARACTERS])[1:-1]
    yield '"'


def _list_pieces(values: "array[int] | list[int]") -> Iterator[str]:
    separator = "["
    for start in range(0, len(values), NUM_CHARACTERS):
        yield separator + encode_json(list(values[start : start + NUM_CHARACTERS]))[1:-1]
        separator = ","
    yield "]" if values else "[]"
