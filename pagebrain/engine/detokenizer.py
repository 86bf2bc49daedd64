"""From token ids to text, as it appears: never half a character, never the beginning of a stop string.

A byte-level tokenizer cuts text into bytes, not characters, so a token may end in the middle of one. A :class:`Detokenizer`
knows the bytes of every token; a :class:`TextStream` feeds those of one sequence to an incremental UTF-8 decoder, which
keeps an unfinished character to itself. Whatever it passes on is then searched for stop strings. Without any, both produce
exactly what Hugging Face's ``tokenizer.decode(ids, clean_up_tokenization_spaces=False)`` produces for the whole sequence.
"""

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers.decoders import ByteLevel

from pagebrain.errors import InvalidRequestError, UnsupportedTokenizerError
from pagebrain.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """The bytes of every token of one tokenizer.

    Args:
        tokenizer: a fast byte-level BPE tokenizer, as GPT-2's.

    Raises:
        UnsupportedTokenizerError: the tokenizer does not map every token to bytes.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        if backend is None or not isinstance(decoder, ByteLevel):
            got = "no decoder of the tokenizers library" if decoder is None else f"the decoder {type(decoder).__name__}"
            raise UnsupportedTokenizerError(
                f"{type(tokenizer).__name__} is not a fast byte-level tokenizer (it has {got}), and PageBrain makes text of "
                "byte-level BPE only, as GPT-2 has it"
            )
        num_ids = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        special_ids = {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
        tokens = [backend.id_to_token(token_id) for token_id in range(num_ids)]
        self._bytes = [b"" if token is None else _token_bytes(token) for token in tokens]
        self._bytes_without_special = [b"" if i in special_ids else text for i, text in enumerate(self._bytes)]

    @property
    def num_ids(self) -> int:
        """One more than the largest token id that the tokenizer knows."""
        return len(self._bytes)

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """What a token contributes to the text; nothing for an id that the tokenizer does not know.

        (A model's vocabulary may be padded beyond its tokenizer's, and Hugging Face leaves such ids out too.)
        """
        if token_id < 0:
            raise InvalidRequestError(f"token ids are integers from 0, got {token_id}")
        table = self._bytes_without_special if skip_special_tokens else self._bytes
        return table[token_id] if token_id < len(table) else b""

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD."""
        text_bytes = b"".join(self.token_bytes(token_id, skip_special_tokens) for token_id in token_ids)
        return text_bytes.decode("utf-8", errors="replace")

    def stream(self, params: SamplingParams) -> "TextStream":
        """The text of one sequence that is still growing."""
        return TextStream(self, params)


class TextStream:
    """The text of one sequence as its tokens come in.

    Stop strings: the text ends before the first one, "first" meaning the one that is complete first, as if the text came
    character by character; so how it is cut into tokens makes no difference. Of several that are complete at the same
    character the longest counts. As in vLLM, one is found only if it ends in the text of a token after the first
    ``min_tokens``.

    Attributes:
        stopped_by: the stop string that was found, or ``None``. Tokens appended after that add no text.
    """

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams) -> None:
        self.stopped_by: str | None = None
        self._detokenizer = detokenizer
        self._params = params
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_tokens = 0
        self._held_back = ""  # the longest end of the text so far that a stop string may begin with
        self._emitted: list[str] = []

    @property
    def text(self) -> str:
        """All text handed out so far."""
        if len(self._emitted) > 1:
            self._emitted = ["".join(self._emitted)]
        return self._emitted[0] if self._emitted else ""

    def append(self, token_id: int) -> str:
        """Take the sequence's next token; returns the text that is final now, often the token's own, maybe none."""
        token_bytes = self._detokenizer.token_bytes(token_id, self._params.skip_special_tokens)
        self._num_tokens += 1
        return self._advance(self._decoder.decode(token_bytes))

    def finish(self) -> str:
        """The sequence has ended: returns what was held back, an unfinished character as U+FFFD."""
        text = self._advance(self._decoder.decode(b"", final=True))
        held_back, self._held_back = self._held_back, ""
        return text + self._emit(held_back)

    def _advance(self, new_text: str) -> str:
        """Emit what can no longer belong to a stop string that is cut off."""
        if self.stopped_by is not None:
            return ""
        if not self._params.stop:
            return self._emit(new_text)
        pending = self._held_back + new_text
        if self._num_tokens > self._params.min_tokens:
            found = self._first_stop(pending, len(self._held_back))
            if found is not None:
                start, self.stopped_by = found
                self._held_back = ""
                end = start + len(self.stopped_by) if self._params.include_stop_str_in_output else start
                return self._emit(pending[:end])
        keep = max(_overlap(pending, stop) for stop in self._params.stop)
        self._held_back = pending[len(pending) - keep :]
        return self._emit(pending[: len(pending) - keep])

    def _first_stop(self, pending: str, num_old: int) -> tuple[int, str] | None:
        """Start and string of the stop string that is complete first, among those that end after ``num_old`` characters."""
        found: list[tuple[int, int, str]] = []
        for stop in self._params.stop:
            start = pending.find(stop, max(0, num_old + 1 - len(stop)))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _emit(self, text: str) -> str:
        if text:
            self._emitted.append(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, short of all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _token_bytes(token: str) -> bytes:
    """The bytes that a token stands for, by the rule of the tokenizers library's ``ByteLevel`` decoder.

    Each character of a byte-level token stands for one byte. An added token need not be written that way; if any character
    stands for none, the token is plain text.
    """
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's way to write bytes as visible characters: printable Latin-1 as itself, the rest from U+0100 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
