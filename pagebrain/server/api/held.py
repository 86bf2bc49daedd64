"""How much of answers the server may hold at a time, and how big an answer to a request can get.

An answer in one piece is kept until its last token is there, and then until its client has taken it. So room for it is
reserved before its request is queued; a request for which there is none is refused, and no answer under way is lost. What a
token takes, held and as JSON, is an estimate: texts differ. Where a text turns out longer, its answer reserves more.
"""

from dataclasses import dataclass

from pagebrain.sampling_params import SamplingParams
from pagebrain.server.error_responses import ApiError, bad_request
from pagebrain.server.link.scores import record_bytes

MIB = 2**20
RETRY_AFTER_S = 2

SAMPLE_BYTES = 1024
"""What a sample takes besides its tokens, held."""

TOKEN_BYTES = 16
"""What a generated token takes, held: its id and its text."""

PROMPT_TOKEN_BYTES = 40
"""What a token of a prompt takes, held: its id as a Python integer, and its text."""

CHOICE_BYTES = 96
"""What an answer takes as JSON besides its tokens."""

TEXT_BYTES = 6
"""What a token's text takes as JSON, quotes and escapes included."""


@dataclass(frozen=True)
class JsonShape:
    """Bytes of JSON that log-probabilities take: ``token`` for one with its token, ``top`` for each of the most probable.

    Measured by ``python tools/answer_memory.py --shapes``.
    """

    token: int
    top: int


COMPLETION = JsonShape(token=70, top=28)
CHAT = JsonShape(token=100, top=80)


def json_bytes(params: SamplingParams, num_prompt_tokens: int, num_generated: int, shape: JsonShape, echo: bool) -> int:
    """Bytes of JSON in the answers to one prompt, about; each sample repeats the prompt if it is echoed.

    Args:
        num_generated: tokens of all samples together.
    """
    of_answer = TEXT_BYTES + (0 if params.logprobs is None else shape.token + params.logprobs * shape.top)
    of_prompt = TEXT_BYTES * echo + (
        0 if params.prompt_logprobs is None else shape.token + params.prompt_logprobs * shape.top
    )
    return params.n * CHOICE_BYTES + num_generated * of_answer + params.n * num_prompt_tokens * of_prompt


def held_bytes(params: SamplingParams, num_prompt_tokens: int, num_generated: int) -> int:
    """Bytes that the server holds of the answers to one prompt, about: the samples share their prompt and its scores."""
    of_answer = TOKEN_BYTES + (0 if params.logprobs is None else record_bytes(params.logprobs))
    of_prompt = PROMPT_TOKEN_BYTES
    if params.prompt_logprobs is not None:
        of_prompt += record_bytes(params.prompt_logprobs)
        if params.n > 1:  # its JSON is kept from one sample to the next
            of_prompt += COMPLETION.token + params.prompt_logprobs * COMPLETION.top
    return params.n * SAMPLE_BYTES + num_generated * of_answer + num_prompt_tokens * of_prompt


class HeldAnswers:
    """The answers in one piece that the server holds, or will hold when they are complete.

    Args:
        max_bytes: of all of them together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> "Hold":
        """Reserve room. Raises ``ApiError``: 400 if there is never so much of it, 503 if there is not now."""
        if num_bytes > self.max_bytes:
            raise bad_request(
                f"the server would hold up to {mib(num_bytes)} of this answer, and of all answers it holds at most "
                f"{mib(self.max_bytes)}: split the request, stream its answer, or lower 'n', 'max_tokens' or 'logprobs'"
            )
        hold = Hold(self)
        hold.resize(num_bytes)
        return hold


class Hold:
    """Room for one answer; :meth:`close` gives it back."""

    def __init__(self, answers: HeldAnswers) -> None:
        self.num_bytes = 0
        self._answers = answers
        self._num_used = 0

    def use(self, num_bytes: int) -> None:
        """So much more of the answer is there. Raises ``ApiError`` (503) if more than reserved is, and there is no room."""
        self._num_used += num_bytes
        if self._num_used > self.num_bytes:
            self.resize(self._num_used)

    def fit(self) -> None:
        """The answer is complete: give back what it does not use."""
        self.resize(self._num_used)

    def resize(self, num_bytes: int) -> None:
        """Reserve so much instead. Raises ``ApiError`` (503) if there is no room for more."""
        answers = self._answers
        total = answers.num_bytes - self.num_bytes + num_bytes
        if num_bytes > self.num_bytes and total > answers.max_bytes:
            raise ApiError(
                503,
                f"the server holds {mib(answers.num_bytes)} of answers that are not complete or not yet fetched, and "
                f"{mib(num_bytes - self.num_bytes)} more would pass the limit of {mib(answers.max_bytes)}: try again later, "
                f"or stream the answer",
                code="server_busy",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        answers.num_bytes, self.num_bytes = total, num_bytes

    def close(self) -> None:
        """The answer was sent, or is not wanted any more."""
        self._num_used = 0
        self.resize(0)


def mib(num_bytes: int) -> str:
    """A size for people."""
    return f"{num_bytes / MIB:.1f} MiB"
