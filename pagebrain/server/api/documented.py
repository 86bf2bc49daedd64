"""The answers in ``/openapi.json``: those of the routes, and those of the guards."""

from typing import Any

from starlette.responses import Response

from pagebrain.server.error_responses import ErrorBody

_MEANINGS = {
    400: "The request cannot be served; the message says why.",
    401: "The API key is missing or wrong.",
    403: "The server has no key and was called by a name that is not this machine's.",
    404: "There is no such model here.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body's content type is not application/json, or it is compressed.",
    503: "The queue is full, too many bodies or answers are held, the server is shutting down, or the engine has stopped.",
}


def documented(answer: Any, *statuses: int, streams: bool = False) -> dict[str, Any]:
    """Arguments for a route's decorator.

    Args:
        answer: type of the body of status 200; ``None`` if the body is never JSON.
        statuses: status codes of the errors that the route itself answers with.
        streams: whether the answer may be server-sent events. OpenAPI 3.1 cannot describe the contents of events.
    """
    success: dict[str, Any] = {"description": "The answer."}
    if streams:
        success["content"] = {"text/event-stream": {}}
    if answer is not None:
        success["model"] = answer
    errors = {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in statuses}
    return {"responses": {200: success, **errors}, "response_model": None, "response_class": Response}


def add_guards_answers(schema: dict[str, Any], needs_key: bool, checks_host: bool) -> None:
    """Add the guards' answers to an OpenAPI schema."""
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    if needs_key:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            statuses = [400, 408, 413, 415, 503] if method == "post" else []
            if checks_host:
                statuses.append(403)
            if needs_key and path != "/health":
                statuses.append(401)
                operation["security"] = [{"key": []}]
            for status in statuses:
                answer = {"description": _MEANINGS[status], "content": body}
                operation["responses"].setdefault(str(status), answer)


def name_the_model(schema: dict[str, Any], name: str) -> None:
    """Set the served model's name as the only value of ``model`` in the requests of an OpenAPI schema."""
    for definition in schema["components"]["schemas"].values():
        model = definition.get("properties", {}).get("model", {})
        if "anyOf" in model:  # only in requests, where the field is optional
            model["anyOf"] = [{"const": name}, {"type": "null"}]
