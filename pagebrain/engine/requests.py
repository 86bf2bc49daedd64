"""From a prompt and parameters to a checked :class:`~pagebrain.engine.sequence.Request`."""

import hashlib
import operator
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

from pagebrain.config import PageBrainConfig
from pagebrain.engine.beam_search import num_candidates
from pagebrain.engine.sequence import Request
from pagebrain.errors import InvalidRequestError
from pagebrain.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | SequenceOf[int]
"""A text, or token ids."""

NO_TOKENIZER = "the model has no tokenizer that PageBrain makes text with"


def make_request(
    prompt: Prompt,
    params: SamplingParams | BeamSearchParams | None,
    request_id: str,
    arrival_index: int,
    config: PageBrainConfig,
    encode: Callable[[str], list[int]] | None,
    has_detokenizer: bool,
    cache_salt: str | None = None,
) -> Request:
    """A checked request. ``None`` for ``params`` is ``SamplingParams()``.

    Raises ``InvalidRequestError`` for a prompt or parameters that can never be served.
    """
    beam_params = params if isinstance(params, BeamSearchParams) else None
    if isinstance(params, BeamSearchParams):
        num_tokens = num_candidates(params, len(config.eos_token_ids))
        if num_tokens > (config.vocab_size or 0):
            raise InvalidRequestError(
                f"beam_width {params.beam_width} needs {num_tokens} candidates, but the vocabulary has {config.vocab_size} "
                "tokens: choose a smaller beam_width"
            )
        params = params.as_sampling_params(num_tokens)
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(f"params must be SamplingParams, got {params!r}")
    token_ids = checked_token_ids(prompt, encode, params, config)
    params.check_vocabulary(config.vocab_size or 0)
    if params.stop and not has_detokenizer:
        raise InvalidRequestError(f"stop strings are text, and {NO_TOKENIZER}: use stop_token_ids")
    return Request(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=token_ids,
        params=params,
        seed=request_seed(params, config.seed, arrival_index),
        arrival_index=arrival_index,
        arrival_s=time.monotonic(),
        cache_salt=cache_salt,
        beam_params=beam_params,
    )


def checked_token_ids(
    prompt: Prompt, encode: Callable[[str], list[int]] | None, params: SamplingParams, config: PageBrainConfig
) -> tuple[int, ...]:
    """The prompt as token ids; ``encode`` makes them of a text.

    Raises ``InvalidRequestError`` if the prompt is empty, has ids outside the vocabulary, leaves no room for a token to
    generate, or is text without a tokenizer.
    """
    if isinstance(prompt, str):
        if encode is None:
            raise InvalidRequestError(f"the prompt is text, and {NO_TOKENIZER}: give it as a list of token ids")
        try:
            prompt.encode()  # a lone surrogate, say from a wrongly decoded file
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the prompt is no valid Unicode text: {error.reason}") from error
        token_ids = encode(prompt)
    else:
        token_ids = _as_ids(prompt)
    assert config.vocab_size is not None and config.max_model_len is not None
    if not token_ids:
        raise InvalidRequestError("the prompt is empty: give at least one token")
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < config.vocab_size:
            more = ": the tokenizer has more tokens than the model's embeddings have rows" if isinstance(prompt, str) else ""
            raise InvalidRequestError(
                f"prompt token {index} is {token_id}, but ids run from 0 to {config.vocab_size - 1}{more}"
            )
    if params.max_tokens == 0:
        if len(token_ids) > config.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens, but at most {config.max_model_len} (max_model_len) can be scored: "
                "shorten it"
            )
    elif len(token_ids) >= config.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(token_ids)} tokens, but at most {config.max_model_len - 1} leave room to generate one "
            f"(max_model_len is {config.max_model_len}): shorten it"
        )
    return tuple(token_ids)


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text: those of Hugging Face's ``tokenizer(text).input_ids``.

    Without ``add_special_tokens`` the tokens that the tokenizer's post-processor adds are left out.
    """
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))


def max_num_tokens(num_prompt_tokens: int, params: SamplingParams, config: PageBrainConfig) -> int:
    """Largest number of tokens of prompt and output. Raises ``InvalidRequestError`` if ``min_tokens`` do not fit.

    A prompt that is only scored counts one token more: the step at its end samples a token, and the engine drops it.
    """
    assert config.max_model_len is not None
    room = config.max_model_len - num_prompt_tokens
    if params.min_tokens > room:
        raise InvalidRequestError(
            f"min_tokens is {params.min_tokens}, but {num_prompt_tokens} prompt tokens leave room for {room}"
        )
    if params.max_tokens == 0:
        return num_prompt_tokens + 1
    return num_prompt_tokens + min(room, params.max_tokens or room)


def request_seed(params: SamplingParams, engine_seed: int, arrival_index: int) -> int:
    """The user's seed, or one derived from the engine's seed and the request's arrival number."""
    if params.seed is not None:
        return params.seed
    digest = hashlib.blake2b(f"{engine_seed}:{arrival_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _as_ids(prompt: Any) -> list[int]:
    try:
        if isinstance(prompt, (bytes, bytearray)):
            raise TypeError
        token_ids = list(prompt)
    except TypeError:
        raise InvalidRequestError(f"a prompt is a string or a list of token ids, got {prompt!r}") from None
    ids = []
    for index, token_id in enumerate(token_ids):
        try:
            if isinstance(token_id, bool):
                raise TypeError
            ids.append(operator.index(token_id))
        except TypeError:
            raise InvalidRequestError(f"prompt token {index} must be an integer, got {token_id!r}") from None
    return ids
