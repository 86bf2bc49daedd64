"""Log-probabilities as OpenAI's two APIs show them: token by token, with texts instead of ids."""

import codecs
from collections.abc import Iterable, Sequence

from pagebrain.detokenizer import Detokenizer
from pagebrain.outputs import TokenLogprobs
from pagebrain.server.responses import CompletionLogprobs, TokenLogprob, TopLogprob

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no way to write."""


class TokenTexts:
    """What tokens look like one by one. Without a tokenizer they have no text, and are named by their ids."""

    def __init__(self, detokenizer: Detokenizer | None) -> None:
        self._detokenizer = detokenizer
        self._texts: dict[int, str] = {}

    def bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """What the token adds to a text."""
        return b"" if self._detokenizer is None else self._detokenizer.token_bytes(token_id, skip_special_tokens)

    def text(self, token_id: int) -> str:
        """The token as a string; ``bytes:\\x..`` for one that is no whole characters."""
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
        """The text of a whole prompt."""
        return "" if self._detokenizer is None else self._detokenizer.decode(token_ids, skip_special_tokens=False)


class CompletionScorer:
    """Makes the legacy logprobs object of one answer, piece by piece.

    It keeps count of the characters, so that each token's ``text_offset`` is where its text begins in the answer's: the
    first character that it has a part in. Bytes that never become a character are sent as U+FFFD, which counts like any
    other. A token that a stop string cuts off keeps the offset that it would have had.

    ``added`` are the prompt's tokens, counted from 0, that the tokenizer put around its text: they have no part in it.
    """

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool, added: frozenset[int] = frozenset()) -> None:
        self._added = added
        self._texts = texts
        self._skip_special_tokens = skip_special_tokens
        self._num_characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def prompt(self, token_ids: Sequence[int], scores: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """The prompt's tokens, which the answer echoes."""
        part = self._part(token_ids, scores, False, self._added)
        self._num_characters += len(self._decoder.decode(b"", final=True))  # the answer's text begins afresh
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
            self._num_characters if index in added else self._advance(self._texts.bytes(token_id, skip_special_tokens))
            for index, token_id in enumerate(token_ids)
        ]
        return {
            "tokens": [self._texts.text(token_id) for token_id in token_ids],
            "token_logprobs": [None if score is None else finite(score.logprob) for score in scores],
            "top_logprobs": [None if score is None else self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _advance(self, token_bytes: bytes) -> int:
        """Count a token's characters. Returns the number of the one that its first byte is a part of."""
        begin, has_unfinished = self._num_characters, bool(self._decoder.getstate()[0])
        text = self._decoder.decode(token_bytes[:1])
        if has_unfinished and text and (len(text) > 1 or self._decoder.getstate()[0]):
            begin += 1  # the byte did not go on with what was unfinished, which has become U+FFFD
        text += self._decoder.decode(token_bytes[1:])
        self._num_characters += len(text)
        return begin

    def _top(self, score: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens, best first, and the chosen one. Of two that look alike the better one counts."""
        top: dict[str, float] = {}
        for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
            top.setdefault(self._texts.text(token_id), finite(logprob))
        return top


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """One piece after the other."""
    return {
        "tokens": first["tokens"] + second["tokens"],
        "token_logprobs": first["token_logprobs"] + second["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + second["top_logprobs"],
        "text_offset": first["text_offset"] + second["text_offset"],
    }


def chat_logprobs(texts: TokenTexts, scores: Iterable[TokenLogprobs]) -> list[TokenLogprob]:
    """The tokens of an answer in a chat."""

    def entry(token_id: int, logprob: float) -> TopLogprob:
        return {"token": texts.text(token_id), "logprob": finite(logprob), "bytes": list(texts.bytes(token_id))}

    return [
        {**entry(score.token_id, score.logprob), "top_logprobs": [entry(*candidate) for candidate in score.top]}
        for score in scores
    ]


def finite(logprob: float) -> float:
    """A number that JSON can hold."""
    return max(logprob, LOWEST_LOGPROB)
