"""Log-probabilities in the JSON formats of OpenAI's two APIs: one entry for each token, with texts instead of ids."""

import codecs
from collections.abc import Iterable, Iterator, Sequence

from pagebrain.engine.detokenizer import Detokenizer
from pagebrain.outputs import TokenLogprobs
from pagebrain.server.api.heavy import NUM_AT_A_TIME, encode_json
from pagebrain.server.api.responses import CompletionLogprobs, TokenLogprob, TopLogprob

Scored = Sequence[TokenLogprobs | None]
"""Scores of consecutive tokens. The first token of a prompt has none: ``None``."""

LOWEST_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON cannot express."""


class TokenTexts:
    """The texts of single tokens. Without a tokenizer a token's text is made from its id."""

    def __init__(self, detokenizer: Detokenizer | None) -> None:
        self._detokenizer = detokenizer
        self._texts: dict[int, str] = {}

    def bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """The bytes that the token adds to a text; empty without a tokenizer."""
        return b"" if self._detokenizer is None else self._detokenizer.token_bytes(token_id, skip_special_tokens)

    def text(self, token_id: int) -> str:
        """The token as a string; ``bytes:\\x..`` if its bytes are not whole characters."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._make_text(token_id)
        return text

    def _make_text(self, token_id: int) -> str:
        if self._detokenizer is None:
            return f"token_id:{token_id}"
        token_bytes = self.bytes(token_id)
        try:
            return token_bytes.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of a prompt; empty without a tokenizer."""
        return "" if self._detokenizer is None else self._detokenizer.decode(token_ids, skip_special_tokens=False)


class CompletionScorer:
    """Makes the legacy logprobs object of one answer, some tokens at a time.

    It counts characters. A token's ``text_offset`` is the position in the answer's text of the first character that holds a
    byte of the token. Bytes that form no character are sent as U+FFFD, which counts as one character. A token that is cut
    off by a stop string keeps the offset that it would have had.

    ``added``: indices of prompt tokens that the tokenizer added to the text. They advance no offset.
    """

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool, added: frozenset[int] = frozenset()) -> None:
        self._added = added
        self._texts = texts
        self._skip_special_tokens = skip_special_tokens
        self.num_characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def prompt(
        self, token_ids: Sequence[int], scores: Sequence[TokenLogprobs | None], first: int = 0, is_last: bool = True
    ) -> CompletionLogprobs:
        """The next tokens of an echoed prompt, the first of them at index ``first``. ``is_last``: the prompt ends here."""
        added = frozenset(index - first for index in self._added)
        part = self._part(token_ids, scores, skip_special_tokens=False, added=added)
        if is_last:
            self.num_characters += len(self._decoder.decode(b"", final=True))  # no character spans prompt and answer
        return part

    def answer(self, token_ids: Sequence[int], scores: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """The next tokens of the answer."""
        return self._part(token_ids, scores, self._skip_special_tokens)

    def _part(
        self,
        token_ids: Sequence[int],
        scores: Sequence[TokenLogprobs | None],
        skip_special_tokens: bool,
        added: frozenset[int] = frozenset(),
    ) -> CompletionLogprobs:
        offsets = [
            self.num_characters if index in added else self._advance(self._texts.bytes(token_id, skip_special_tokens))
            for index, token_id in enumerate(token_ids)
        ]
        return {
            "tokens": [self._texts.text(token_id) for token_id in token_ids],
            "token_logprobs": [None if score is None else finite(score.logprob) for score in scores],
            "top_logprobs": [None if score is None else self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _advance(self, token_bytes: bytes) -> int:
        """Count a token's characters. Returns the position of the character that holds its first byte."""
        begin, has_unfinished = self.num_characters, bool(self._decoder.getstate()[0])
        text = self._decoder.decode(token_bytes[:1])
        if has_unfinished and text and (len(text) > 1 or self._decoder.getstate()[0]):
            begin += 1  # the byte did not continue the unfinished character, which was decoded as U+FFFD
        text += self._decoder.decode(token_bytes[1:])
        self.num_characters += len(text)
        return begin

    def _top(self, score: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens, best first, and the chosen one. Of tokens with equal texts the most probable is kept."""
        top: dict[str, float] = {}
        for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
            top.setdefault(self._texts.text(token_id), finite(logprob))
        return top


class ScoredPrompt:
    """A prompt's scores as JSON, in parts of some tokens. The parts are made for the first sample and kept for the others.

    Attributes:
        scores: must be set before :meth:`parts` is called.

    Args:
        num_samples: number of calls of :meth:`parts`. The last call drops scores and parts.
    """

    def __init__(self, token_ids: Sequence[int], num_samples: int) -> None:
        self.scores: Scored | None = None
        self._token_ids = token_ids
        self._num_left = num_samples
        self._written: list[dict[str, str]] | None = None
        self._num_characters = 0

    def parts(self, scorer: CompletionScorer) -> Iterator[dict[str, str]]:
        """The parts, for one sample. ``scorer`` is the sample's; it then has counted the prompt's characters."""
        assert self.scores is not None
        self._num_left -= 1
        scores, written = self.scores, self._written
        if not self._num_left:
            self.scores = self._written = None
        if written is not None:
            scorer.num_characters = self._num_characters
            yield from written
            return
        kept: list[dict[str, str]] = []
        for start in range(0, len(self._token_ids), NUM_AT_A_TIME):
            end = start + NUM_AT_A_TIME
            is_last = end >= len(self._token_ids)
            part = _items(scorer.prompt(self._token_ids[start:end], scores[start:end], start, is_last))
            if self._num_left:
                kept.append(part)
            yield part
        if self._num_left:
            self._written, self._num_characters = kept, scorer.num_characters


def answer_parts(
    scorer: CompletionScorer, token_ids: Sequence[int], scores: Sequence[TokenLogprobs | None]
) -> Iterator[dict[str, str]]:
    """The next tokens of an answer as JSON, in parts of some tokens."""
    for start in range(0, len(token_ids), NUM_AT_A_TIME):
        end = start + NUM_AT_A_TIME
        yield _items(scorer.answer(token_ids[start:end], scores[start:end]))


def completion_pieces(parts: Iterable[dict[str, str]]) -> Iterator[str]:
    """The legacy logprobs object as JSON. The biggest list comes first, because the other lists are held until the end."""
    columns: dict[str, list[str]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
    separator = '{"top_logprobs":['
    for part in parts:
        yield f"{separator}{part['top_logprobs']}"
        separator = ","
        for name, column in columns.items():
            column.append(part[name])
    yield "]" if separator == "," else f"{separator}]"
    yield from (f',"{name}":[{",".join(column)}]' for name, column in columns.items())
    yield "}"


def _items(part: CompletionLogprobs) -> dict[str, str]:
    """Each list's items as JSON, without its brackets."""
    return {name: encode_json(items)[1:-1] for name, items in part.items()}


def chat_pieces(texts: TokenTexts, scores: Sequence[TokenLogprobs]) -> Iterator[str]:
    """The logprobs object of a chat as JSON, in pieces of some tokens."""
    separator = '{"content":['
    for start in range(0, len(scores), NUM_AT_A_TIME):
        yield separator + encode_json(chat_logprobs(texts, scores[start : start + NUM_AT_A_TIME]))[1:-1]
        separator = ","
    yield "]}" if separator == "," else f"{separator}]}}"


def chat_logprobs(texts: TokenTexts, scores: Iterable[TokenLogprobs]) -> list[TokenLogprob]:
    """The tokens of an answer in a chat."""

    def entry(token_id: int, logprob: float) -> TopLogprob:
        return {"token": texts.text(token_id), "logprob": finite(logprob), "bytes": list(texts.bytes(token_id))}

    return [
        {**entry(score.token_id, score.logprob), "top_logprobs": [entry(*candidate) for candidate in score.top]}
        for score in scores
    ]


def finite(logprob: float) -> float:
    """The number, or :data:`LOWEST_LOGPROB` if it is lower."""
    return max(logprob, LOWEST_LOGPROB)
