"""Memory for answers in one piece: estimates of their size, and reservations against a limit.

An answer in one piece (not streamed) is held until its last token has come and the client has received it. Memory for it is
reserved before its request is queued. Without enough memory the request is refused, so an accepted answer is not lost.
The size of a token, held and as JSON, is an estimate. An answer with longer texts reserves more while it is read.
"""

from dataclasses import dataclass

from pagebrain.sampling_params import SamplingParams
from pagebrain.server.error_responses import ApiError, bad_request
from pagebrain.server.link.scores import record_bytes

MIB = 2**20
RETRY_AFTER_S = 2

SAMPLE_BYTES = 1024
"""Memory of a sample, without its tokens."""

TOKEN_BYTES = 16
"""Memory of a generated token: its id and its text."""

PROMPT_TOKEN_BYTES = 40
"""Memory of a prompt token: its id as a Python integer, and its text."""

CHOICE_BYTES = 96
"""JSON of a sample, without its tokens."""

TEXT_BYTES = 6
"""JSON of a token's text, quotes and escapes included."""


@dataclass(frozen=True)
class JsonShape:
    """Bytes of JSON for the log-probabilities of a token: ``token``, and ``top`` for each of the most probable tokens.

    Measured by ``python tools/answer_memory.py --shapes``.
    """

    token: int
    top: int


COMPLETION = JsonShape(token=70, top=28)
CHAT = JsonShape(token=100, top=80)


def json_bytes(params: SamplingParams, num_prompt_tokens: int, num_generated: int, shape: JsonShape, echo: bool) -> int:
    """Estimated bytes of JSON in the answers to one prompt. With ``echo`` each sample repeats the prompt.

    ``num_generated`` counts the tokens of all samples together.
    """
    of_answer = TEXT_BYTES + (0 if params.logprobs is None else shape.token + params.logprobs * shape.top)
    of_prompt = TEXT_BYTES * echo + (
        0 if params.prompt_logprobs is None else shape.token + params.prompt_logprobs * shape.top
    )
    return params.n * CHOICE_BYTES + num_generated * of_answer + params.n * num_prompt_tokens * of_prompt


def held_bytes(params: SamplingParams, num_prompt_tokens: int, num_generated: int) -> int:
    """Estimated memory of the answers to one prompt, in bytes. The samples share the prompt and its scores."""
    of_answer = TOKEN_BYTES + (0 if params.logprobs is None else record_bytes(params.logprobs))
    of_prompt = PROMPT_TOKEN_BYTES
    if params.prompt_logprobs is not None:
        of_prompt += record_bytes(params.prompt_logprobs)
        if params.n > 1:  # the JSON of the scores is kept for the next sample
            of_prompt += COMPLETION.token + params.prompt_logprobs * COMPLETION.top
    return params.n * SAMPLE_BYTES + num_generated * of_answer + num_prompt_tokens * of_prompt


class HeldAnswers:
    """Memory reserved for answers in one piece: ``num_bytes`` now, at most ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> "Hold":
        """Reserve memory. Raises ``ApiError``: 400 if ``num_bytes`` is over the limit, 503 if too little is free now."""
        if num_bytes > self.max_bytes:
            raise bad_request(
                f"the answer could need {mib(num_bytes)} of memory, and all answers together may use at most "
                f"{mib(self.max_bytes)}: split the request, stream its answer, or lower 'n', 'max_tokens' or 'logprobs'"
            )
        hold = Hold(self)
        hold.resize(num_bytes)
        return hold


class Hold:
    """The memory reserved for one answer. :meth:`close` frees it."""

    def __init__(self, answers: HeldAnswers) -> None:
        self.num_bytes = 0
        self._answers = answers
        self._num_used = 0

    def use(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more as used. Reserves more if needed; raises ``ApiError`` (503) if too little is free."""
        self._num_used += num_bytes
        if self._num_used > self.num_bytes:
            self.resize(self._num_used)

    def fit(self) -> None:
        """Free what a complete answer does not use."""
        self.resize(self._num_used)

    def resize(self, num_bytes: int) -> None:
        """Change the reservation to ``num_bytes``. Raises ``ApiError`` (503) if too little is free."""
        answers = self._answers
        total = answers.num_bytes - self.num_bytes + num_bytes
        if num_bytes > self.num_bytes and total > answers.max_bytes:
            raise ApiError(
                503,
                f"answers that are not complete or not yet sent use {mib(answers.num_bytes)} of memory, and "
                f"{mib(num_bytes - self.num_bytes)} more would pass the limit of {mib(answers.max_bytes)}: try again later, "
                f"or stream the answer",
                code="server_busy",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        answers.num_bytes, self.num_bytes = total, num_bytes

    def close(self) -> None:
        """Free the reservation. May be called twice."""
        self._num_used = 0
        self.resize(0)


def mib(num_bytes: int) -> str:
    """The size in MiB, as text for messages."""
    return f"{num_bytes / MIB:.1f} MiB"
