"""How the API says no: every error, whoever raised it, becomes OpenAI's ``{"error": {"message", "type", "param", "code"}}``.

What a client did wrong is told to it in one sentence. What went wrong inside is logged, without the exception's message,
which may quote a prompt, and the client learns only that it did.
"""

import json
import logging
import re
import reprlib
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from typing_extensions import TypedDict

from pagebrain.errors import InvalidRequestError, PageBrainError
from pagebrain.server.api.defaults import DEFAULTS
from pagebrain.server.link.admission import QueueFullError
from pagebrain.server.link.handle import EngineDeadError
from pagebrain.server.link.streams import DrainingError, RequestFailedError, SlowReaderError

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARACTERS = 600
"""Longer messages are cut: they quote what the client sent."""

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 415: "unsupported_media_type"}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlist = _short.maxdict = 3
_short.maxlevel = 2


class ErrorDetail(TypedDict):
    """What went wrong. ``param`` names the field of the request that is to blame, if one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer other than success, made on purpose.

    Args:
        status: of HTTP.
        message: one sentence for the client.
        param: the field of the request that is to blame.
        code: a name for the error that programs can act on.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code or _CODES.get(status)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, param=param)


def unsupported(param: str, but: str = "") -> ApiError:
    """A 400 for a field that the API does not know, or does not honour; ``but`` says what of it is, and what was got."""
    says = f"supported {but}" if but else "not supported by this server"
    return ApiError(400, f"'{param}' is {says}: leave it out", param=param, code="unsupported_parameter")


def as_api_error(error: Exception) -> ApiError:
    """The answer that an exception deserves; an unexpected one is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}", headers=error.headers)
    if isinstance(error, RequestValidationError):
        return first_problem(error.errors())
    if isinstance(error, InvalidRequestError):
        return bad_request(str(error), _blamed(str(error)))
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, DrainingError):
        return ApiError(503, str(error), code="server_shutting_down")
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, SlowReaderError):
        return ApiError(503, str(error), code="slow_reader")
    if isinstance(error, RequestFailedError):  # the engine's process has logged it
        return ApiError(500, str(error), code="request_failed")
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a request failed with %s:\n%s", type(error).__name__, frames)
    return ApiError(500, "the server failed to answer this request; its log says where", code="internal_error")


def error_body(error: ApiError) -> ErrorBody:
    """The JSON value that describes an error."""
    message = error.detail
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[:MAX_MESSAGE_CHARACTERS] + " ..."
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: whatever the content quotes, it can be sent."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(text, status, dict(headers or {}), "application/json")


def error_response(error: Exception) -> Response:
    """The response that an exception deserves."""
    answer = as_api_error(error)
    return json_response(error_body(answer), answer.status_code, answer.headers)


def error_event(error: Exception) -> str:
    """The server-sent event that tells a client whose stream has begun already."""
    return f"data: {json.dumps(error_body(as_api_error(error)))}\n\n"


def add_error_handlers(app: FastAPI) -> None:
    """Answer all exceptions, and what the router refuses (404, 405), in OpenAI's shape."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and not isinstance(error, ApiError) and error.status_code in (404, 405):
            message = f"there is no {request.method} {request.url.path[:200]} here; /openapi.json says what there is"
            error = ApiError(error.status_code, message, headers=error.headers)
        return error_response(error)

    for kind in (HTTPException, RequestValidationError, PageBrainError):
        app.add_exception_handler(kind, handle)


def first_problem(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors as one sentence that names the field."""
    problem = errors[0]
    path = [part for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return bad_request("the body is not valid JSON")
    if not path:
        return bad_request("the body must be a JSON object with content type application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}"[:80] for part in path).removeprefix(".")
    if problem["type"] == "missing":
        return bad_request(f"'{param}' is required", param)
    if problem["type"] == "extra_forbidden":
        defaults = " or ".join(json.dumps(value) for value in DEFAULTS.get(path[-1], ()))
        return unsupported(param, defaults and f"only as {defaults}, got {_short.repr(problem['input'])}")
    says = re.sub(r"^(Input|String|List|Dictionary|Value|Tuple) should", "must", problem["msg"])
    says = re.sub(r" after validation, not .*", "", says)
    return bad_request(f"'{param}' {says}, got {_short.repr(problem['input'])}", param)


def _blamed(message: str) -> str | None:
    """The field that a message of the engine's begins with: it says ``top_p must ...`` or ``the prompt has ...``."""
    found = re.match(r"(?:the )?(prompt|stop|[a-z]+_[a-z_]+|n|temperature|seed|logprobs)\b", message)
    return found[1] if found else None
