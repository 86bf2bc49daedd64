"""What the API answers, as types: OpenAI's objects, and our own where OpenAI has none.

They are plain dictionaries; the checker holds the code to them, and ``/openapi.json`` shows them.
"""

from typing import Literal

from typing_extensions import TypedDict


class Usage(TypedDict):
    """Tokens of all prompts, and of all answers to them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(TypedDict):
    """Per token: its text, its log-probability, those of the most probable tokens, and where in the text it begins.

    A token that ends within a character is written as ``bytes:\\x..``. Nothing predicts a prompt's first token.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One answer, or in a stream a piece of one; ``finish_reason`` is there at its end."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionResponse(TypedDict):
    """``POST /v1/completions`` without a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(TypedDict):
    """A token that could have stood here. ``bytes`` are its own, also where they are no whole character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, with the most probable ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Per token of the answer."""

    content: list[TokenLogprob]


class AnswerMessage(TypedDict):
    """The model's turn."""

    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatResponse(TypedDict):
    """``POST /v1/chat/completions`` without a stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(TypedDict):
    """The model that is served. ``max_model_len``: most tokens of prompt and answer; ``vocab_size``: ids are below it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    vocab_size: int


class ModelList(TypedDict):
    """``GET /v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(TypedDict):
    """``POST /tokenize``."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(TypedDict):
    """``POST /detokenize``."""

    prompt: str


class Health(TypedDict):
    """``GET /health`` while requests are taken."""

    status: Literal["ok"]


class Version(TypedDict):
    """``GET /version``."""

    version: str
