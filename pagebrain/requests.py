"""From what a user hands in to a checked :class:`~pagebrain.sequence.Request`, and from its sequences to its output."""

import hashlib
import operator
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pagebrain.config import PageBrainConfig
from pagebrain.detokenizer import TextStream
from pagebrain.errors import InvalidRequestError
from pagebrain.outputs import CompletionOutput, RequestMetrics, RequestOutput
from pagebrain.sampling_params import SamplingParams
from pagebrain.sequence import Request, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | SequenceOf[int]
"""A text, or token ids."""

NO_TOKENIZER = "the model has no tokenizer that PageBrain makes text with"


def checked_token_ids(
    prompt: Prompt, encode: Callable[[str], list[int]] | None, params: SamplingParams, config: PageBrainConfig
) -> tuple[int, ...]:
    """The prompt as token ids.

    A text becomes what ``encode`` makes of it, with the tokens that the tokenizer puts around a text.

    Raises ``InvalidRequestError`` for one that is empty, names ids outside the vocabulary, leaves no position to generate
    into although something is to be generated, or is text while there is no tokenizer.
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

    Without ``add_special_tokens`` the tokens that the tokenizer's post-processor puts around a text are left out.
    """
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))


def max_num_tokens(num_prompt_tokens: int, params: SamplingParams, config: PageBrainConfig) -> int:
    """Most tokens of prompt and output; ``InvalidRequestError`` if ``min_tokens`` do not fit.

    A prompt that is only scored counts one token more: a step samples at its end, and the engine drops that token.
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
    """The user's seed, or one that the engine's seed and the request's number in line determine."""
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


@dataclass
class RequestState:
    """A request under way: its sequences, their text, and its times. ``stop_ids`` are the tokens that end a sequence."""

    request: Request
    sequences: list[Sequence]
    streams: list[TextStream | None]
    stop_ids: frozenset[int] = frozenset()
    wants_deltas: bool = True
    keeps_logprobs: bool = True
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    stream_of: dict[int, TextStream | None] = field(init=False)

    def __post_init__(self) -> None:
        self.stream_of = {seq.seq_id: stream for seq, stream in zip(self.sequences, self.streams)}

    @property
    def is_finished(self) -> bool:
        """Whether all samples have ended."""
        return all(seq.is_finished for seq in self.sequences)

    def output(self) -> RequestOutput:
        """The request as it stands."""
        first = self.sequences[0]
        wants_prompt_logprobs = self.keeps_logprobs and self.request.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=tuple(self._completion(seq, stream) for seq, stream in zip(self.sequences, self.streams)),
            finished=self.is_finished,
            metrics=RequestMetrics(
                arrival_s=self.request.arrival_s,
                first_scheduled_s=self.first_scheduled_s,
                first_token_s=self.first_token_s,
                finished_s=self.finished_s,
                num_preemptions=sum(seq.num_preemptions for seq in self.sequences),
            ),
            prompt_logprobs=tuple(first.prompt_logprobs) if wants_prompt_logprobs else None,
        )

    def _completion(self, seq: Sequence, stream: TextStream | None) -> CompletionOutput:
        wants_logprobs = self.keeps_logprobs and seq.params.logprobs is not None
        return CompletionOutput(
            index=seq.sample_index,
            text="" if stream is None else stream.text,
            token_ids=tuple(seq.output_token_ids),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            cumulative_logprob=sum(entry.logprob for entry in seq.logprobs) if wants_logprobs else None,
            logprobs=tuple(seq.logprobs) if wants_logprobs else None,
        )
