"""From the bytes of a request's body to a JSON value, or to one sentence that says what is wrong with them.

Stricter than Python's own reading of JSON: no ``NaN``, no key twice, no text that cannot be encoded. A nesting that would
exhaust the stack is an error like any other.
"""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from pagebrain.server.errors import bad_request

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89abAB-Fc-f]")


def parse_json(body: bytes) -> Any:
    """The JSON value in ``body``. Raises ``ApiError`` with status 400."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except ValueError:  # Python reads no integer of more than some thousand digits
        raise bad_request("the body holds a number with too many digits") from None
    if _SURROGATE_ESCAPE.search(text):
        _check_text(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise bad_request(f"the body is not valid JSON: {name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise bad_request(f"the body names {ascii(twice)[:80]} twice in one object")
    return members


def _check_text(value: Any) -> None:
    """Raise if a string anywhere in ``value`` holds half of a surrogate pair: it is no text, and no tokenizer takes it."""
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
                message = "the body holds a string that is no valid Unicode text (half of a surrogate pair)"
                raise bad_request(message) from None


class JsonRequest(Request):
    """A request whose JSON is read by :func:`parse_json`."""

    async def json(self) -> Any:
        """The body's JSON value."""
        return parse_json(await self.body())


class JsonRoute(APIRoute):
    """A route that reads JSON strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, given our reading of the body."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json
