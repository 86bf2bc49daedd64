"""Work that is too long for the event loop: reading big bodies, putting big answers together, writing them as JSON.

It is Python's own work, so a thread gives the event loop its turns and makes nothing faster: all of it is done one piece
after the other, in one thread. No single call into C may be long, for during one nobody else gets a turn.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.responses import Response

from pagebrain.server.errors import json_response

BIG_ANSWER = 4096
"""Tokens and log-probabilities; a bigger answer is made in the thread."""

NUM_AT_A_TIME = 256
"""Items of a list that are written as JSON by one call."""

MAX_DEPTH = 4
"""Down to here objects are written member by member: an answer, its choices, a choice, its logprobs."""

Result = TypeVar("Result")

_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pagebrain-heavy")
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


async def in_turn(function: Callable[..., Result], *args: Any) -> Result:
    """What ``function`` returns, called in the thread when those before it are done."""
    return await asyncio.get_running_loop().run_in_executor(_thread, function, *args)


async def json_answer(make: Callable[[], Any], num_items: int) -> Response:
    """The response with the JSON value that ``make`` returns.

    Args:
        num_items: tokens and log-probabilities in it, about; decides whether it is made in the thread.
    """
    if num_items <= BIG_ANSWER:
        return json_response(make())
    return await in_turn(lambda: Response("".join(json_pieces(make())).encode("ascii"), media_type="application/json"))


def json_pieces(value: Any, depth: int = 0) -> Iterator[str]:
    """The JSON of ``value``, in pieces that take a few milliseconds each."""
    if isinstance(value, dict) and depth < MAX_DEPTH:
        separator = "{"
        for name, member in value.items():
            yield f"{separator}{_encode(name)}:"
            yield from json_pieces(member, depth + 1)
            separator = ","
        yield "}" if value else "{}"
    elif isinstance(value, list) and value and isinstance(value[0], dict) and depth < 2:  # each may be long itself
        separator = "["
        for item in value:
            yield separator
            yield from json_pieces(item, depth + 1)
            separator = ","
        yield "]"
    elif isinstance(value, list) and len(value) > NUM_AT_A_TIME:
        separator = "["
        for start in range(0, len(value), NUM_AT_A_TIME):
            yield separator + _encode(value[start : start + NUM_AT_A_TIME])[1:-1]
            separator = ","
        yield "]"
    else:
        yield _encode(value)
