"""From token ids to text, piece by piece, without half characters and without the beginning of a stop string.

A byte-level tokenizer cuts text into bytes, so a token may end in the middle of a character. A :class:`Detokenizer` has the
bytes of every token. A :class:`TextStream` feeds the bytes of one sequence to an incremental UTF-8 decoder, which holds back
an unfinished character, and searches the decoded text for stop strings. Without stop strings, both produce exactly the text
of Hugging Face's ``tokenizer.decode(ids, clean_up_tokenization_spaces=False)`` for the whole sequence.
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
                f"{type(tokenizer).__name__} is not a fast byte-level tokenizer (it has {got}), and PageBrain "
                "decodes only byte-level BPE, as GPT-2 has it"
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
        """The bytes of a token; none for an id that the tokenizer does not know.

        A model's vocabulary may be padded beyond its tokenizer's. Hugging Face leaves such ids out too.
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
        """A new stream for the text of one sequence."""
        return TextStream(self, params)


class TextStream:
    """The text of one sequence as its tokens come in.

    The text ends before the first stop string. The first is the one whose last character comes first. So the result does
    not depend on how the text is cut into tokens. If several end at the same character, the longest counts. As in vLLM, a
    stop string counts only if it ends in the text of a token after the first ``min_tokens``.

    Attributes:
        stopped_by: the stop string that was found, or ``None``. Tokens appended after it add no text.
    """

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams) -> None:
        self.stopped_by: str | None = None
        self._detokenizer = detokenizer
        self._params = params
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_tokens = 0
        self._held_back = ""  # the longest end of the text that is a beginning of a stop string
        self._emitted: list[str] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        if len(self._emitted) > 1:
            self._emitted = ["".join(self._emitted)]
        return self._emitted[0] if self._emitted else ""

    def append(self, token_id: int) -> str:
        """Take the sequence's next token. Returns the text that is final now, which may be empty."""
        token_bytes = self._detokenizer.token_bytes(token_id, self._params.skip_special_tokens)
        self._num_tokens += 1
        return self._advance(self._decoder.decode(token_bytes))

    def finish(self) -> str:
        """End the stream. Returns the text that was held back, with an unfinished character as U+FFFD."""
        text = self._advance(self._decoder.decode(b"", final=True))
        held_back, self._held_back = self._held_back, ""
        return text + self._emit(held_back)

    def _advance(self, new_text: str) -> str:
        """Emit the text that cannot be the beginning of a stop string."""
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
        """Position and text of the stop string that ends first, among those that end after ``num_old`` characters."""
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
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _token_bytes(token: str) -> bytes:
    """The bytes of a token, by the rule of the tokenizers library's ``ByteLevel`` decoder.

    Each character of a byte-level token stands for one byte. An added token may be plain text: a character that stands for
    no byte shows it.
    """
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's visible characters for bytes: printable Latin-1 as itself, the other bytes from U+0100 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
