"""Parses the body of a request as JSON. An invalid body is refused with status 400 and one sentence.

The rules are stricter than those of Python's parser. ``NaN``, duplicate keys and text that cannot be encoded are errors.
Objects, lists and members are limited in number, because each of them costs far more memory and time than its bytes.
A big body is parsed in a thread.
"""

import json
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from pagebrain.server.api.heavy import in_turn
from pagebrain.server.error_responses import bad_request

BIG_BODY = 2**16
"""Bytes. A bigger body is parsed in a thread, and its objects, lists and members are counted first."""

MAX_MEMBERS = 1100
"""Most members of one object. A ``logit_bias`` may have 1024."""

MAX_PARTS = 2**15
"""Most objects and lists in a body, and most members of objects. 1024 messages of ten text parts each need fewer."""

MAX_VALUES = 2**19
"""Most values in lists and objects, counted by commas. A request may hold half as many token ids."""

_SLICE = 2**16
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89abAB-Fc-f]")


def parse_json(body: bytes) -> Any:
    """The JSON value in ``body``. Raises ``ApiError`` (400)."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    if text.startswith("\ufeff"):
        raise bad_request("the body is not valid JSON: it begins with a byte order mark (U+FEFF): leave it out")
    if len(text) > BIG_BODY:
        _check_parts(text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except ValueError:  # Python refuses an integer of more than a few thousand digits
        raise bad_request("the body holds a number with too many digits") from None
    if _SURROGATE_ESCAPE.search(text):
        _check_text(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise bad_request(f"the body is not valid JSON: {name} is not a JSON number")


def _check_parts(text: str) -> None:
    """Raise if a JSON text holds more parts than a request can use. The text is not parsed; counts are right for valid JSON.

    The first count includes characters inside strings: it is quick, and an upper bound.
    """
    if _is_modest(_count_parts(text)):
        return
    counts = [sum(column) for column in zip(*map(_count_parts, _outside_strings(text)))]
    if not _is_modest(counts):
        raise bad_request(
            f"the body holds {counts[0]} objects and lists, {counts[1]} members of objects and {counts[2]} commas, and no "
            f"request needs more than {MAX_PARTS}, {MAX_PARTS} and {MAX_VALUES}: split it"
        )


def _count_parts(text: str) -> list[int]:
    return [text.count("{") + text.count("["), text.count(":"), text.count(",")]


def _is_modest(counts: list[int]) -> bool:
    return max(counts[0], counts[1]) <= MAX_PARTS and counts[2] <= MAX_VALUES


def _outside_strings(text: str) -> Iterator[str]:
    """The characters outside the strings of a JSON text. The text is read in slices, so that each step is short."""
    text = text.replace(r"\\", "").replace(r"\"", "")  # each quote that is left begins or ends a string
    within = 0
    for start in range(0, len(text), _SLICE):
        parts = text[start : start + _SLICE].split('"')
        yield "".join(parts[within::2])
        within = (within + len(parts) - 1) % 2


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_MEMBERS:
        raise bad_request(f"the body holds an object of {len(pairs)} members, and none may have more than {MAX_MEMBERS}")
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise bad_request(f"the body names {ascii(twice)[:80]} twice in one object")
    return members


def _check_text(value: Any) -> None:
    """Raise if a string in ``value`` holds half of a surrogate pair. Tokenizers do not accept such a string."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left.extend(value)
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                message = "the body holds a string that is not valid Unicode (half of a surrogate pair)"
                raise bad_request(message) from None


class JsonRequest(Request):
    """A request whose JSON is parsed by :func:`parse_json`."""

    async def json(self) -> Any:
        """The body's JSON value. Raises ``ApiError`` (400)."""
        body = await self.body()
        return parse_json(body) if len(body) <= BIG_BODY else await in_turn(parse_json, body)


class JsonRoute(APIRoute):
    """A route whose request is a :class:`JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, called with a :class:`JsonRequest`."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json
