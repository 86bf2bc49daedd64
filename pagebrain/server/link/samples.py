"""The whole answer of a sample, collected from its deltas in a few bytes per token."""

from array import array

from pagebrain.outputs import OutputDelta, TokenLogprobs
from pagebrain.server.link.scores import Scores


class PackedSample:
    """The text, token ids and scores of a sample, packed."""

    def __init__(self) -> None:
        self._text = bytearray()  # UTF-8
        self._token_ids = array("i")
        self._scores: Scores[TokenLogprobs] = Scores(0, bytearray())
        self._last: OutputDelta | None = None
        self._prompt_scores: Scores[TokenLogprobs | None] | None = None

    def add(self, delta: OutputDelta) -> int:
        """Add the next delta. Returns the bytes that it takes."""
        text = delta.text.encode()
        self._text += text
        self._token_ids.extend(delta.token_ids)
        num_bytes = len(text) + 4 * len(delta.token_ids)
        if delta.logprobs:
            new = Scores.pack(delta.logprobs)
            num_bytes += len(new.data)
            if not self._scores:
                self._scores = Scores(new.num_top, bytearray(new.data))
            elif new.num_top == self._scores.num_top:
                self._scores.data += new.data
            else:
                joined = Scores.joined([self._scores, new])
                self._scores = Scores(joined.num_top, bytearray(joined.data))
        if delta.prompt_logprobs is not None:
            self._prompt_scores = Scores.pack(delta.prompt_logprobs)
        self._last = delta
        return num_bytes

    def whole(self, request_id: str, index: int) -> OutputDelta:
        """The sample as one delta."""
        assert self._last is not None
        return OutputDelta(
            request_id,
            index,
            self._text.decode(),
            self._token_ids,
            self._scores,
            self._last.finish_reason,
            self._last.stop_reason,
            self._prompt_scores,
            self._last.metrics,
        )
