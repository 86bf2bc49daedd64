"""What ``/openapi.json`` says of answers: exactly those that are given. ``app.py`` adds what the guards answer."""

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
        answer: type of the body of status 200; ``None`` if it is never JSON.
        statuses: of the errors that the route itself may answer with.
        streams: whether the answer may be server-sent events; OpenAPI 3.1 has no way to say what is in them.
    """
    success: dict[str, Any] = {"description": "The answer."}
    if streams:
        success["content"] = {"text/event-stream": {}}
    if answer is not None:
        success["model"] = answer
    errors = {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in statuses}
    return {"responses": {200: success, **errors}, "response_model": None, "response_class": Response}


def add_guards_answers(schema: dict[str, Any], needs_key: bool, checks_host: bool) -> None:
    """Add to an OpenAPI schema what requests are told that never reach their route."""
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
    """Say in an OpenAPI schema that ``model`` is this one wherever a request has such a field: there is no other."""
    for definition in schema["components"]["schemas"].values():
        model = definition.get("properties", {}).get("model", {})
        if "anyOf" in model:  # of a request; an answer always has it
            model["anyOf"] = [{"const": name}, {"type": "null"}]
