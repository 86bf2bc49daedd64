"""The sampling parameters of a request, under vLLM's names.

A :class:`SamplingParams` is checked once, when it is made; the engine does not check it again. :mod:`pagebrain.sampling`
computes with it. :class:`BeamSearchParams` are those of a request that is answered by beam search.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pagebrain.errors import InvalidRequestError

MAX_LOGPROBS = 20
"""Largest ``logprobs`` and ``prompt_logprobs``."""

MAX_SAMPLES = 128
"""Largest ``n``."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Attributes:
        n: independent samples drawn for the prompt, 1 to 128.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of most probable tokens whose probabilities add up to at least this, in (0, 1].
        top_k: keep this many most probable tokens; 0 or -1 keeps all.
        min_p: drop tokens less probable than ``min_p`` times the most probable one, in [0, 1].
        repetition_penalty: > 1 divides (or multiplies, if negative) the logits of tokens seen in prompt or output; 0.01 to
            100.
        presence_penalty: subtracted once from the logit of each token seen in the output, in [-2, 2].
        frequency_penalty: subtracted per occurrence in the output, in [-2, 2].
        logit_bias: token id -> number added to its logit, in [-100, 100].
        max_tokens: most tokens to generate; ``None`` means until the model's last position. 0 only scores the prompt (see
            ``prompt_logprobs``), which may then fill every position.
        min_tokens: no end of sequence, stop token or stop string ends the sample before this many tokens.
        stop: strings that end the sample; the text is cut before them.
        stop_token_ids: token ids that end the sample; the token stays in ``token_ids``, its text is left out.
        ignore_eos: continue after the end-of-sequence token.
        seed: makes the sample reproducible in any batch; ``None`` derives one from the engine's seed.
        logprobs: return the log-probability of each chosen token and of this many most probable ones, 0 to 20.
        prompt_logprobs: the same for each prompt token.
        include_stop_str_in_output: keep the stop string (or stop token's text) in the text.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        InvalidRequestError: with the argument, what was got and what was expected.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            _check_bool(self, name)
        _check_int(self, "n", 1, MAX_SAMPLES)
        _check_number(self, "temperature", 0.0, math.inf)
        _check_number(self, "top_p", 0.0, 1.0, above_low=True)
        _check_int(self, "top_k", -1, None)
        _check_number(self, "min_p", 0.0, 1.0)
        _check_number(self, "repetition_penalty", 0.01, 100.0)
        _check_number(self, "presence_penalty", -2.0, 2.0)
        _check_number(self, "frequency_penalty", -2.0, 2.0)
        _check_int(self, "max_tokens", 0, None, optional=True)
        _check_int(self, "min_tokens", 0, None)
        _check_int(self, "seed", None, None, optional=True)
        _check_int(self, "logprobs", 0, MAX_LOGPROBS, optional=True)
        _check_int(self, "prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        object.__setattr__(self, "stop", self._checked_stop())
        object.__setattr__(self, "stop_token_ids", self._checked_stop_token_ids())
        object.__setattr__(self, "logit_bias", self._checked_logit_bias())

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ``InvalidRequestError`` if a token id named here is not below ``vocab_size``."""
        for name, token_ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", tuple(self.logit_bias))):
            for token_id in token_ids:
                if token_id >= vocab_size:
                    raise InvalidRequestError(
                        f"{name} holds token id {token_id}, but the vocabulary ends at {vocab_size - 1}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {
            "stop": list(self.stop),
            "stop_token_ids": list(self.stop_token_ids),
            "logit_bias": dict(self.logit_bias),
        }

    def _checked_stop(self) -> tuple[str, ...]:
        stop: object = self.stop
        strings: Sequence[object] = () if stop is None else (stop,) if isinstance(stop, str) else _as_sequence("stop", stop)
        for string in strings:
            if not isinstance(string, str) or not string:
                raise InvalidRequestError(f"stop must hold non-empty strings, got {string!r}")
        return tuple(str(string) for string in strings)

    def _checked_stop_token_ids(self) -> tuple[int, ...]:
        token_ids = () if self.stop_token_ids is None else _as_sequence("stop_token_ids", self.stop_token_ids)
        return tuple(_checked_token_id("stop_token_ids", token_id) for token_id in token_ids)

    def _checked_logit_bias(self) -> dict[int, float]:
        bias: object = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            raise InvalidRequestError(f"logit_bias must map token ids to numbers, got {bias!r}")
        checked: dict[int, float] = {}
        for token_id, value in bias.items():
            number_like = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not number_like or not -100.0 <= float(value) <= 100.0:
                raise InvalidRequestError(f"logit_bias[{token_id!r}] must be a number between -100 and 100, got {value!r}")
            checked[_checked_token_id("logit_bias", token_id)] = float(value)
        return checked


MAX_BEAM_WIDTH = 128
"""Largest ``beam_width``."""


@dataclass(frozen=True)
class BeamSearchParams:
    """How beam search continues one prompt. Scores and ends are those of Hugging Face's ``generate(num_beams=...)``.

    The score of an output is the sum of its tokens' log-probabilities, divided by ``num_tokens ** length_penalty``. Only
    generated tokens count, with the one that ends the sequence. (vLLM counts the prompt too.)

    Attributes:
        beam_width: beams, and outputs returned, 1 to 128.
        max_tokens: most tokens to generate; ``None`` means until the model's last position.
        length_penalty: above 0 favours longer outputs, below 0 shorter ones; -10 to 10.
        early_stopping: what ends the search when ``beam_width`` outputs have ended. ``True``: nothing more is needed.
            ``False``: no beam could score better if it ended now. ``"never"``: no beam could score better at any length.
        ignore_eos: continue after the end-of-sequence token.
        temperature: must be 0. Beam search draws nothing.
        include_stop_str_in_output: keep the text of the end-of-sequence token.

    Raises:
        InvalidRequestError: with the argument, what was got and what was expected.
    """

    beam_width: int
    max_tokens: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    temperature: float = 0.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_int(self, "beam_width", 1, MAX_BEAM_WIDTH)
        _check_int(self, "max_tokens", 1, None, optional=True)
        _check_number(self, "length_penalty", -10.0, 10.0)
        _check_number(self, "temperature", 0.0, math.inf)
        if self.temperature != 0.0:
            raise InvalidRequestError(f"beam search draws nothing: temperature must be 0, got {self.temperature:g}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidRequestError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            _check_bool(self, name)

    def as_sampling_params(self, num_candidates: int) -> SamplingParams:
        """Parameters with which a step returns the ``num_candidates`` most probable next tokens of a beam."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )
        object.__setattr__(params, "logprobs", num_candidates)  # may be more than a request may ask for
        return params


def _check_bool(params: object, name: str) -> None:
    if not isinstance(getattr(params, name), bool):
        raise InvalidRequestError(f"{name} must be True or False, got {getattr(params, name)!r}")


def _check_number(params: object, name: str, low: float, high: float, above_low: bool = False) -> None:
    value = getattr(params, name)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer larger than any float
        number = math.inf
    if not (low <= number <= high) or not math.isfinite(number) or (above_low and number == low):
        bounds = f"{'greater than' if above_low else 'at least'} {low:g}"
        bounds += f" and at most {high:g}" if math.isfinite(high) else " and finite"
        raise InvalidRequestError(f"{name} must be {bounds}, got {value!r}")
    object.__setattr__(params, name, number)


def _check_int(params: object, name: str, low: int | None, high: int | None, optional: bool = False) -> None:
    value = getattr(params, name)
    if value is None and optional:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be {'None or ' if optional else ''}an integer, got {value!r}")
    value = int(value)
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} must be {bounds}, got {value!r}")
    object.__setattr__(params, name, value)


def _as_sequence(name: str, value: object) -> Sequence[object]:
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    raise InvalidRequestError(f"{name} must be a list, got {value!r}")


def _checked_token_id(name: str, token_id: object) -> int:
    if not isinstance(token_id, numbers.Integral) or isinstance(token_id, bool) or int(token_id) < 0:
        raise InvalidRequestError(f"{name} must name token ids (integers from 0), got {token_id!r}")
    return int(token_id)
