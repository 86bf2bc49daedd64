"""Token ids of a request's prompts: renders chats and tokenizes texts, long ones in a thread.

A text that is too long for any tokenization is refused before it is tokenized, which saves the work.
"""

import asyncio
import logging
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError, TemplateSyntaxError, UndefinedError

from pagebrain.engine.requests import NO_TOKENIZER
from pagebrain.errors import InvalidRequestError
from pagebrain.sampling_params import SamplingParams
from pagebrain.server.api.protocol import ChatMessage
from pagebrain.server.api.templates import own_template
from pagebrain.server.error_responses import ApiError, bad_request

if TYPE_CHECKING:
    from pagebrain.server.link.client import EngineClient

logger = logging.getLogger(__name__)

LONG_TEXT = 4096
"""Characters. A longer text is rendered and tokenized in a thread."""

MAX_TEXT = 2**20
"""Most characters of a text for ``/tokenize``. A tokenizer holds Python's global lock for part of its work."""


class PromptReader:
    """Makes token ids of texts and chats.

    Args:
        client: has the tokenizer, and checks requests as the engine does.
        chat_template: Jinja source; ``None`` is the tokenizer's own.
    """

    def __init__(self, client: "EngineClient", chat_template: str | None) -> None:
        self._client = client
        self._why_no_chats: str | None = None
        if chat_template is None:
            chat_template, self._why_no_chats = own_template(client.tokenizer)
        self._chat_template = chat_template
        self._max_bytes = _max_bytes(client)
        self._one_long_text = asyncio.Semaphore(1)

    async def token_ids(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams, add_special_tokens: bool = True
    ) -> list[tuple[int, ...] | Sequence[int]]:
        """Each prompt's token ids: for a text those of Hugging Face's ``tokenizer(text).input_ids``.

        A rendered chat has its special tokens already: pass ``add_special_tokens=False``.
        Raises ``ApiError`` for an empty prompt, and ``InvalidRequestError``, with the prompt's index if there are several.
        """
        num_characters = 0
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                self._check_fits(prompt, f"prompt {index}: " if len(prompts) > 1 else "")
                num_characters += len(prompt)
        if num_characters > LONG_TEXT:
            encoded = await asyncio.to_thread(self._encode_all, prompts, add_special_tokens)
        else:
            encoded = self._encode_all(prompts, add_special_tokens)
        if not all(encoded):  # an empty text, and the tokenizer adds no special tokens
            raise bad_request("'prompt' must be a non-empty string or hold non-empty strings with this tokenizer", "prompt")
        if len(encoded) > 1:  # a single prompt is checked when it is submitted
            for index, ids in enumerate(encoded):
                try:
                    self._client.check(list(ids), params)
                except InvalidRequestError as error:
                    raise InvalidRequestError(f"prompt {index}: {error}") from None
        return encoded

    async def text_ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of any text; may be empty. Long texts are tokenized one at a time, so that prompts do not wait for them.

        Raises ``ApiError`` (400) for more than :data:`MAX_TEXT` characters.
        """
        if len(text) > MAX_TEXT:
            raise bad_request(f"the text has {len(text)} characters, and may have at most {MAX_TEXT}: split it", "prompt")
        if len(text) <= LONG_TEXT:
            return self._encode(text, add_special_tokens)
        async with self._one_long_text:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def added_tokens(self, text: str) -> frozenset[int]:
        """Indices of the tokens that the tokenizer's post-processor adds to the text."""
        tokenizer = self._client.tokenizer
        if tokenizer is None or not tokenizer.num_special_tokens_to_add():
            return frozenset()
        mask = tokenizer(text, return_special_tokens_mask=True, verbose=False).special_tokens_mask
        return frozenset(index for index, is_added in enumerate(mask) if is_added)

    async def chat_prompt(self, messages: Sequence[ChatMessage]) -> str:
        """The text of a chat, made by the chat template.

        Raises ``ApiError``: 400 without a template or if it refuses these messages, 500 if it fails otherwise (logged).
        """
        if self._client.tokenizer is None:
            raise bad_request(f"messages are text, and {NO_TOKENIZER}: use /v1/completions with token ids", "messages")
        if self._chat_template is None:
            why = self._why_no_chats or "the model has no chat template"
            raise bad_request(f"{why}: use /v1/completions, or start the server with --chat-template", "messages")
        turns = [message.turn for message in messages]
        if sum(len(message.content) for message in messages) > LONG_TEXT:
            return await asyncio.to_thread(self._render, turns)
        return self._render(turns)

    def _render(self, turns: list[dict[str, str]]) -> str:
        assert self._client.tokenizer is not None
        try:
            text = self._client.tokenizer.apply_chat_template(
                turns, chat_template=self._chat_template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            if isinstance(error, TemplateError) and _is_about_messages(error):
                raise bad_request(f"the chat template refuses these messages: {error}", "messages") from error
            logger.error("the chat template failed with %s%s", type(error).__name__, _template_line(error))
            logger.debug("the chat template's exception", exc_info=True)
            raise ApiError(500, "the server's chat template failed; its log says where", code="internal_error") from None
        return str(text)

    def _encode_all(
        self, prompts: Sequence[str | Sequence[int]], add_special_tokens: bool
    ) -> list[tuple[int, ...] | Sequence[int]]:
        return [self._encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._client.encode(text) if add_special_tokens else self._client.encode(text, add_special_tokens=False)

    def _check_fits(self, text: str, where: str) -> None:
        if self._max_bytes is None or len(text) * 4 <= self._max_bytes:
            return
        num_bytes = len(text.encode())
        if num_bytes > self._max_bytes:
            raise InvalidRequestError(
                f"{where}the prompt has {num_bytes} bytes, and {self._client.config.max_model_len} tokens (max_model_len) "
                f"hold at most {self._max_bytes}: shorten it"
            )


def _is_about_messages(error: TemplateError) -> bool:
    """Whether a template refused these messages, or missed a part of one. All other errors are mistakes in the template."""
    if isinstance(error, UndefinedError):
        return not str(error).endswith("is undefined")  # that is an unknown name, not a missing attribute of a message
    return type(error) is TemplateError  # raised by raise_exception in the template


def _template_line(error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    if isinstance(error, TemplateSyntaxError):
        lines = [error.lineno]
    return f" in its line {lines[-1]}" if lines else ""


def _max_bytes(client: "EngineClient") -> int | None:
    """Upper bound on the UTF-8 bytes of a text that fits; ``None`` if the bytes of tokens do not add up to the text."""
    backend = getattr(client.tokenizer, "backend_tokenizer", None)
    detokenizer, config = client.detokenizer, client.config
    if backend is None or detokenizer is None or backend.normalizer is not None:
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # such a token also consumes any number of spaces beside it
    assert config.vocab_size is not None and config.max_model_len is not None
    longest = max(len(detokenizer.token_bytes(token_id, skip_special_tokens=False)) for token_id in range(config.vocab_size))
    return config.max_model_len * longest
