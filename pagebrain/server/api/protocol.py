"""The API's requests as pydantic models: strict types, limited sizes, no unknown fields.

:class:`~pagebrain.sampling_params.SamplingParams` documents the sampling fields, and checks them again. Fields that are not
implemented are accepted with values that have no effect, see :mod:`pagebrain.server.api.defaults`. ``/openapi.json`` is
generated from these models.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from pagebrain.sampling_params import MAX_LOGPROBS, MAX_SAMPLES, BeamSearchParams, SamplingParams
from pagebrain.server.api.defaults import asks_for_nothing, describe_defaults
from pagebrain.server.api.fields import (
    MAX_LABEL_CHARACTERS,
    Content,
    Label,
    LogitBias,
    Penalty,
    Probability,
    Prompt,
    Stop,
    Temperature,
    TokenId,
)
from pagebrain.server.error_responses import bad_request, unsupported

MAX_CHOICES = 1024
"""Most answers to one request (prompts times ``n``)."""

MAX_MESSAGES = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_TOKENS_TO_DECODE = 65_536
DEFAULT_MAX_TOKENS = 16
"""Default of ``max_tokens`` in ``/v1/completions``, as in OpenAI's API."""


_ONLY_NULLS: JsonDict = {"additionalProperties": {"type": "null"}}


class Strict(BaseModel):
    """A request. Types are not converted. Unknown fields are refused, unless their value has no effect."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_ONLY_NULLS)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = cls.model_fields
        return {name: member for name, member in value.items() if name in fields or not asks_for_nothing(name, member)}


class StreamOptions(Strict):
    """``include_usage``: a last event counts all tokens. ``continuous_usage_stats``: each event counts its answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def _describe_request(schema: JsonDict) -> None:
    schema.update(_ONLY_NULLS)
    describe_defaults(schema)


class SamplingRequest(Strict):
    """Fields of completions and chats. ``null`` means the same as leaving the field out.

    ``add_special_tokens``: add the tokenizer's special tokens to a text. The default is true for completions, and false for
    chats, because the chat template writes these tokens.
    With ``use_beam_search`` the answers are the ``n`` best outputs of a beam search with ``n`` beams, best first.
    The fields from ``user`` on do not change the answer. ``user`` (newer name: ``safety_identifier``) is written to the
    request log, and ``request_id`` becomes a part of the answer's id.
    """

    model_config = ConfigDict(json_schema_extra=_describe_request)

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    logit_bias: LogitBias | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARACTERS)] | None = None
    session_id: Label | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    prompt_cache_options: dict[str, Any] | None = None
    cache_prompt: bool | None = None
    cache_salt: Label | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None

    @property
    def num_samples(self) -> int:
        """``n``, by default 1."""
        return 1 if self.n is None else self.n

    @property
    def end_user(self) -> str | None:
        """The end user's name, as the client gave it."""
        return self.user or self.safety_identifier

    def checked_stream_options(self) -> StreamOptions:
        """The stream options. Raises ``ApiError`` (400) if one is set without ``stream``."""
        options = self.stream_options or StreamOptions()
        if (options.include_usage or options.continuous_usage_stats) and not self.stream:
            raise bad_request("'stream_options' needs 'stream' to be true", "stream_options")
        return options

    def beam_search_params(self, params: SamplingParams) -> BeamSearchParams | None:
        """Those of a request for beam search, whose sampling parameters are ``params``; ``None`` for another request.

        Raises ``ApiError`` (400) for a field that has no meaning with, or without, beam search.
        """
        if not self.use_beam_search:
            if self.length_penalty not in (None, 1):
                raise bad_request("'length_penalty' needs 'use_beam_search' to be true", "length_penalty")
            if self.early_stopping:
                raise bad_request("'early_stopping' needs 'use_beam_search' to be true", "early_stopping")
            return None
        if self.stream:
            raise bad_request("the answers of a beam search are known at its end: leave 'stream' out", "stream")
        for name, neutral in _NEUTRAL_IN_BEAM_SEARCH.items():
            value = getattr(self, name, None)
            if value not in neutral or (name == "logprobs" and value is not None and value is not False):  # 0 == False
                raise bad_request(f"'{name}' has no meaning in beam search: leave it out", name)
        return BeamSearchParams(
            beam_width=self.num_samples,
            max_tokens=params.max_tokens,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            early_stopping=self.early_stopping or False,
            ignore_eos=params.ignore_eos,
            include_stop_str_in_output=params.include_stop_str_in_output,
        )

    def _sampling_params(self, **others: Any) -> SamplingParams:
        if self.best_of not in (None, self.num_samples):
            raise unsupported("best_of", f"only as 'n' ({self.num_samples}), got {self.best_of}")
        named = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        return SamplingParams(**{name: value for name, value in (named | others).items() if value is not None})


_NEUTRAL_IN_BEAM_SEARCH: dict[str, tuple[object, ...]] = {
    "temperature": (None, 0, 1),
    "top_p": (None, 1),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_tokens": (None, 0),
    "stop": (None, [], ""),
    "stop_token_ids": (None, []),
    "skip_special_tokens": (None, True),
    "logprobs": (None, False),
    "echo": (None, False),
}
"""Field -> values with which a request for beam search may have it."""

_SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens"),
    *("ignore_eos", "seed"),
)


def _one_limit(max_tokens: int | None, max_completion_tokens: int | None) -> int | None:
    """The limit under either of its two names. Raises ``ApiError`` (400) if both are given and differ."""
    if None not in (max_tokens, max_completion_tokens) and max_tokens != max_completion_tokens:
        raise bad_request("'max_tokens' and 'max_completion_tokens' differ: give one of them", "max_completion_tokens")
    return max_completion_tokens if max_tokens is None else max_tokens


class CompletionRequest(SamplingRequest):
    """``POST /v1/completions``. ``max_completion_tokens`` is another name of ``max_tokens``."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, also of a single one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def sampling_params(self) -> SamplingParams:
        """The engine's sampling parameters. Raises ``ApiError`` or ``InvalidRequestError``.

        With ``max_tokens`` 0 the answer is the echoed prompt, with log-probabilities if requested; no token is generated.
        """
        limit = _one_limit(self.max_tokens, self.max_completion_tokens)
        max_tokens = DEFAULT_MAX_TOKENS if limit is None else limit
        only_scores = max_tokens == 0
        if only_scores and not self.echo:
            raise bad_request("'max_tokens' must be at least 1, unless 'echo' is true", "max_tokens")
        if only_scores and self.min_tokens:
            raise bad_request(f"'min_tokens' must be at most 'max_tokens' (0), got {self.min_tokens}", "min_tokens")
        if len(self.prompts) * self.num_samples > MAX_CHOICES:
            raise bad_request(
                f"{len(self.prompts)} prompts with n={self.num_samples} ask for {len(self.prompts) * self.num_samples} "
                f"answers, and a request gets at most {MAX_CHOICES}: split it",
                "n",
            )
        return self._sampling_params(
            max_tokens=max_tokens,
            logprobs=None if only_scores else self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


class ChatMessage(Strict):
    """One message of a conversation. Several text parts are joined by newlines."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Label | None = None

    @property
    def turn(self) -> dict[str, str]:
        """The message as chat templates expect it."""
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": self.content, **named}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(SamplingRequest):
    """``POST /v1/chat/completions``. ``max_completion_tokens`` is the newer name of ``max_tokens``."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def sampling_params(self) -> SamplingParams:
        """The engine's sampling parameters. Raises ``ApiError`` or ``InvalidRequestError``."""
        if self.top_logprobs and not self.logprobs:
            raise bad_request("'top_logprobs' needs 'logprobs' to be true", "top_logprobs")
        return self._sampling_params(
            max_tokens=_one_limit(self.max_tokens, self.max_completion_tokens),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class GenerateRequest(Strict):
    """``POST /generate``: one prompt, one sampling method, always streamed.

    ``temperature`` (default 1) is for methods ``top_p`` and ``top_k``; ``top_p`` (0.9) and ``top_k`` (50) for the method of
    that name.
    """

    prompt: str
    max_new_tokens: Annotated[int, Field(ge=1)] = 100
    method: Literal["greedy", "top_p", "top_k"] = "greedy"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None

    def sampling_params(self) -> SamplingParams:
        """The engine's sampling parameters. Raises ``ApiError`` (400) for a parameter that the method does not use."""
        uses = {"greedy": (), "top_p": ("temperature", "top_p"), "top_k": ("temperature", "top_k")}[self.method]
        for name in ("temperature", "top_p", "top_k"):
            if getattr(self, name) is not None and name not in uses:
                raise bad_request(f"'{name}' is not used by method '{self.method}': leave it out", name)
        if self.method == "greedy":
            return SamplingParams(temperature=0, max_tokens=self.max_new_tokens)
        temperature = 1.0 if self.temperature is None else self.temperature
        if self.method == "top_p":
            top_p = 0.9 if self.top_p is None else self.top_p
            return SamplingParams(temperature=temperature, top_p=top_p, max_tokens=self.max_new_tokens)
        top_k = 50 if self.top_k is None else self.top_k
        return SamplingParams(temperature=temperature, top_k=top_k, max_tokens=self.max_new_tokens)


class TokenizeRequest(Strict):
    """``POST /tokenize``: a text, or the messages of a chat, which the chat template turns into text.

    ``add_special_tokens`` has the default of completions for a text, and of chats for messages.
    """

    model_config = ConfigDict(
        json_schema_extra={**_ONLY_NULLS, "oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    )

    model: str | None = None
    prompt: str = ""
    messages: Messages = []
    add_special_tokens: bool | None = None

    @property
    def wants_chat(self) -> bool:
        """Whether messages were given. Raises ``ApiError`` (400) unless exactly one of the two fields was."""
        given = {"prompt", "messages"} & self.model_fields_set
        if len(given) != 1:
            raise bad_request("give 'prompt' or 'messages', and not both", "prompt")
        return "messages" in given


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS_TO_DECODE, fail_fast=True)]
