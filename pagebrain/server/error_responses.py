"""Error responses: every exception becomes OpenAI's ``{"error": {"message", "type", "param", "code"}}``.

A client's mistake is described to it in one sentence. An internal error is logged without the exception's message, which may
quote a prompt, and the client only gets status 500.
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
"""Longer messages are cut. They may quote what the client sent."""

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 415: "unsupported_media_type"}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlist = _short.maxdict = 3
_short.maxlevel = 2


class ErrorDetail(TypedDict):
    """The error. ``param`` names the invalid field of the request, if there is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of an error response."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error response to the client.

    Args:
        status: the HTTP status code.
        message: one sentence for the client.
        param: the invalid field of the request.
        code: the error's name for programs; by default by the status.
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
    """Status 400; ``param`` is the invalid field."""
    return ApiError(400, message, param=param)


def unsupported(param: str, but: str = "") -> ApiError:
    """Status 400 for a field that is not supported. ``but`` names the supported values and the value that was got."""
    says = f"supported {but}" if but else "not supported by this server"
    return ApiError(400, f"'{param}' is {says}: leave it out", param=param, code="unsupported_parameter")


def as_api_error(error: Exception) -> ApiError:
    """The error response for an exception. An unexpected exception is logged."""
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
    if isinstance(error, RequestFailedError):  # the engine process has logged it
        return ApiError(500, str(error), code="request_failed")
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a request failed with %s:\n%s", type(error).__name__, frames)
    return ApiError(500, "the server failed to answer this request; its log says where", code="internal_error")


def error_body(error: ApiError) -> ErrorBody:
    """The body of an error response. A long message is cut."""
    message = error.detail
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[:MAX_MESSAGE_CHARACTERS] + " ..."
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with JSON in ASCII: text that is not valid Unicode can be sent too."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(text, status, dict(headers or {}), "application/json")


def error_response(error: Exception) -> Response:
    """The HTTP response for an exception."""
    answer = as_api_error(error)
    return json_response(error_body(answer), answer.status_code, answer.headers)


def error_event(error: Exception) -> str:
    """The server-sent event for an exception in a stream that has begun."""
    return f"data: {json.dumps(error_body(as_api_error(error)))}\n\n"


def add_error_handlers(app: FastAPI) -> None:
    """Answer all exceptions, and the router's 404 and 405, in OpenAI's format."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and not isinstance(error, ApiError) and error.status_code in (404, 405):
            message = f"there is no {request.method} {request.url.path[:200]} here: /openapi.json lists what there is"
            error = ApiError(error.status_code, message, headers=error.headers)
        return error_response(error)

    for kind in (HTTPException, RequestValidationError, PageBrainError):
        app.add_exception_handler(kind, handle)


def first_problem(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, as one sentence that names the field."""
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
    """The field that an engine's message begins with, as in ``top_p must ...`` or ``the prompt has ...``."""
    found = re.match(r"(?:the )?(prompt|stop|[a-z]+_[a-z_]+|n|temperature|seed|logprobs)\b", message)
    return found[1] if found else None
