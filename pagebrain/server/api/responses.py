"""The API's answers as types: OpenAI's objects, and PageBrain's own where OpenAI has none.

They are plain dictionaries. The type checker checks the code against them, and ``/openapi.json`` shows them.
"""

from typing import Literal

from typing_extensions import NotRequired, TypedDict


class PromptTokensDetails(TypedDict):
    """``cached_tokens``: prompt tokens whose keys and values were in the prefix cache, and were not computed."""

    cached_tokens: int


class Usage(TypedDict):
    """Number of tokens in all prompts and all answers of a request. The details come with its end."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]


class CompletionLogprobs(TypedDict):
    """Per token: its text, its log-probability, those of the most probable tokens, and where in the text it begins.

    A token that ends within a character is written as ``bytes:\\x..``. A prompt's first token has no log-probability.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One answer, or in a stream a piece of one. ``finish_reason`` is set in the last piece."""

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
    """A candidate for a position. ``bytes`` are the token's own, also if they are not whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the most probable tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """One entry for each token of the answer."""

    content: list[TokenLogprob]


class AnswerMessage(TypedDict):
    """The model's message."""

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
    """The served model. ``max_model_len``: most tokens of prompt and answer. Token ids are below ``vocab_size``."""

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
    """``GET /health`` while requests are accepted."""

    status: Literal["ok"]


class Version(TypedDict):
    """``GET /version``."""

    version: str
