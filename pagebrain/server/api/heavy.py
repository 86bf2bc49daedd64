"""Work that is too long for one turn of the event loop: parsing big bodies, and writing big answers as JSON.

Big bodies are parsed in one thread, one after the other. Parsing holds Python's global lock, so the thread makes nothing
faster, but the event loop still gets its turns. Answers are written on the event loop in chunks of a few milliseconds each.
In a turn of the loop one chunk is written, whatever the number of answers.
"""

import asyncio
import json
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

CHUNK_BYTES = 2**16
"""Approximate size of a chunk. A longer answer is sent in chunks."""

NUM_AT_A_TIME = 32
"""Tokens whose log-probabilities one call writes as JSON. With 21 each the call takes a millisecond or two."""

NUM_CHARACTERS = 2**14
"""Characters of a string, or items of a list, that one call writes as JSON."""

Result = TypeVar("Result")

_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pagebrain-heavy")
_turns: "WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]" = WeakKeyDictionary()
encode_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


async def in_turn(function: Callable[..., Result], *args: Any) -> Result:
    """Call ``function`` in the thread, after the calls before it, and return its result."""
    return await asyncio.get_running_loop().run_in_executor(_thread, function, *args)


def next_chunk(pieces: Iterator[str]) -> bytes:
    """The next pieces as one chunk of at least ``CHUNK_BYTES`` of ASCII, unless the pieces end before; empty at the end."""
    taken: list[str] = []
    num_bytes = 0
    for piece in pieces:
        taken.append(piece)
        num_bytes += len(piece)
        if num_bytes >= CHUNK_BYTES:
            break
    return "".join(taken).encode("ascii")


async def later_chunk(pieces: Iterator[str]) -> bytes:
    """:func:`next_chunk`, after the event loop has had a turn and waiting answers have written their chunks."""
    async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        await asyncio.sleep(0)
        return next_chunk(pieces)


def json_pieces(value: dict[str, Any]) -> Iterator[str]:
    """The JSON of an object, in pieces of a few milliseconds each. Members may be long strings or lists of numbers."""
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
