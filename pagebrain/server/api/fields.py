"""Types of request fields: accepted values, limits, and JSON schemas.

For a mistake in a union such as "a string, or a list of strings", pydantic gives one error for each member. So fields with
several forms are checked here, and each mistake gets one sentence.
"""

from typing import Annotated, Any

from pydantic import Field, JsonValue, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 256
"""Most prompts in one request."""

MAX_PROMPT_TOKENS = 131_072
"""Most token ids in a list. The model's own limit is lower and is checked later."""

MAX_REQUEST_TOKENS = 2 * MAX_PROMPT_TOKENS
"""Most token ids in all lists of a request together."""

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIASES = 1024
MAX_LABEL_CHARACTERS = 512
"""Longest free text in fields such as ``user`` and ``session_id``."""


def _invalid(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid", "{message}", {"message": message})


def _check_prompt(value: object) -> object:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _invalid("must be a string, non-empty token ids, or a non-empty list of these")
    if type(value[0]) is int:
        return _check_ids(value)
    if len(value) > MAX_PROMPTS:
        raise _invalid(f"must hold at most {MAX_PROMPTS} prompts, holds {len(value)}")
    if isinstance(value[0], str):
        if not all(isinstance(item, str) for item in value):
            raise _invalid("must hold strings only, if it begins with a string")
        return value
    if not all(isinstance(item, list) and item for item in value):
        raise _invalid("must be a string, token ids, a list of strings or a list of non-empty lists of token ids")
    num_tokens = sum(map(len, value))
    if num_tokens > MAX_REQUEST_TOKENS:
        raise _invalid(f"must hold at most {MAX_REQUEST_TOKENS} token ids in all its lists, holds {num_tokens}")
    return [_check_ids(item) for item in value]


def _check_ids(value: list[Any]) -> list[Any]:
    if len(value) > MAX_PROMPT_TOKENS:
        raise _invalid(f"must hold at most {MAX_PROMPT_TOKENS} token ids, holds {len(value)}")
    if set(map(type, value)) != {int} or min(value) < 0:  # built-in functions: a Python loop over 100,000 ids is slow
        raise _invalid("must hold token ids, which are integers from 0")
    return value


def _check_stop(value: object) -> object:
    if value == "":
        return []
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > MAX_STOPS:
        raise _invalid(f"must be a string or a list of at most {MAX_STOPS} strings")
    if not all(isinstance(string, str) and 0 < len(string) <= MAX_STOP_CHARACTERS for string in strings):
        raise _invalid(f"must hold strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return strings


def _check_logit_bias(value: object) -> object:
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIASES:
        raise _invalid(f"must be an object of at most {MAX_LOGIT_BIASES} token ids, each with a number")
    biases: dict[int, float] = {}
    for key, number in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key):
            raise _invalid("must have token ids as its keys, written as decimal integers")
        if type(number) not in (int, float) or not -100 <= number <= 100:
            raise _invalid("must have numbers from -100 to 100 as its values")
        biases[int(key)] = float(number)
    return biases


def _check_content(value: object) -> object:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _invalid("must be a string or a non-empty list of text parts")
    for part in value:
        named = {name for name, member in part.items() if member is not None} if isinstance(part, dict) else set()
        if named - {"cache_control"} != {"type", "text"}:
            raise _invalid('must hold parts of the form {"type": "text", "text": "..."}; no other kind is supported')
        if part["type"] != "text" or not isinstance(part["text"], str):
            raise _invalid("must hold parts of type text, with a string as their text; no other kind is supported")
    return "\n".join(part["text"] for part in value)


_TOKEN_IDS: JsonValue = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
    "minItems": 1,
    "maxItems": MAX_PROMPT_TOKENS,
}
_TEXT: JsonValue = {"type": "string"}
_PROMPT_SCHEMA: dict[str, JsonValue] = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_PROMPTS},
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
_STOP_TEXT: dict[str, JsonValue] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP_SCHEMA: dict[str, JsonValue] = {
    "anyOf": [_STOP_TEXT | {"minLength": 0}, {"type": "array", "items": _STOP_TEXT, "maxItems": MAX_STOPS}]
}
_LOGIT_BIAS_SCHEMA: dict[str, JsonValue] = {
    "type": "object",
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_LOGIT_BIASES,
}
_TEXT_PART: dict[str, JsonValue] = {
    "type": "object",
    "properties": {"type": {"type": "string", "enum": ["text"]}, "text": {"type": "string"}, "cache_control": {}},
    "required": ["type", "text"],
    "additionalProperties": {"type": "null"},
}
_CONTENT_SCHEMA: dict[str, JsonValue] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]
}

Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]], PlainValidator(_check_prompt), WithJsonSchema(_PROMPT_SCHEMA)
]
Stop = Annotated[list[str], PlainValidator(_check_stop), WithJsonSchema(_STOP_SCHEMA)]
LogitBias = Annotated[dict[int, float], PlainValidator(_check_logit_bias), WithJsonSchema(_LOGIT_BIAS_SCHEMA)]
Content = Annotated[str, PlainValidator(_check_content), WithJsonSchema(_CONTENT_SCHEMA)]
Label = Annotated[str, Field(max_length=MAX_LABEL_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
