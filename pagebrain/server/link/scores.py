"""Packed log-probabilities, for the way from the engine's process to the reader: a record for each token.

A :class:`~pagebrain.outputs.TokenLogprobs` with the 20 most probable tokens takes some 2,400 bytes. A packed record takes
256 bytes and is no work for Python's garbage collector. A record is unpacked when it is written as JSON.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar, overload

from pagebrain.outputs import TokenLogprobs

NOTHING = -1
"""The token id in a record without scores, and in unused places of a record."""

Score = TypeVar("Score", bound=TokenLogprobs | None, covariant=True)


class Scores(Sequence[Score]):
    """An immutable sequence of scores. An entry may be ``None``, as for a prompt's first token.

    Args:
        num_top: number of most probable tokens in each record.
        data: the records: int32 token id, rank and ids of the most probable tokens, then float64 log-probabilities.
    """

    __slots__ = ("data", "num_top")

    def __init__(self, num_top: int, data: bytes | bytearray) -> None:
        self.num_top = num_top
        self.data = data

    @classmethod
    def pack(cls, scores: Sequence[Score]) -> "Scores[Score]":
        """Pack scores."""
        if isinstance(scores, Scores):
            return scores
        num_top = max((len(score.top) for score in scores if score is not None), default=0)
        pack = _record(num_top).pack
        return cls(num_top, b"".join([pack(*_fields(score, num_top)) for score in scores]))

    @classmethod
    def joined(cls, pieces: "Sequence[Sequence[Score]]") -> "Scores[Score]":
        """Several sequences of scores as one."""
        packed = [cls.pack(piece) for piece in pieces if piece]
        num_top = max((piece.num_top for piece in packed), default=0)
        return cls(
            num_top, b"".join([piece.data if piece.num_top == num_top else piece._wider(num_top) for piece in packed])
        )

    def _wider(self, num_top: int) -> bytes:
        """The records with ``num_top`` places. Needed if a sampler that the user wrote returns different numbers."""
        pack = _record(num_top).pack
        return b"".join([pack(*_fields(score, num_top)) for score in self])

    def __len__(self) -> int:
        return len(self.data) // record_bytes(self.num_top)

    @overload
    def __getitem__(self, index: int) -> Score: ...
    @overload
    def __getitem__(self, index: slice) -> "Scores[Score]": ...
    def __getitem__(self, index: int | slice) -> "Score | Scores[Score]":
        size = record_bytes(self.num_top)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"a slice of scores must have step 1, got {step}")
            return Scores(self.num_top, self.data[start * size : max(start, stop) * size])
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} scores, got index {index}")
        return self._unpacked(_record(self.num_top).unpack_from(self.data, index % len(self) * size))

    def __iter__(self) -> Iterator[Score]:
        return map(self._unpacked, _record(self.num_top).iter_unpack(self.data))

    def _unpacked(self, fields: tuple[Any, ...]) -> Score:
        if fields[0] == NOTHING:
            return None  # type: ignore[return-value]  # NOTHING marks an entry that was None
        ids = fields[2 : 2 + self.num_top]
        top = tuple(zip(ids, fields[3 + self.num_top :]))
        if ids and ids[-1] == NOTHING:
            top = tuple(pair for pair in top if pair[0] != NOTHING)
        return TokenLogprobs(fields[0], fields[2 + self.num_top], fields[1], top)  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        return Scores, (self.num_top, self.data)

    def __repr__(self) -> str:
        return f"Scores({list(self)})"


def record_bytes(num_top: int) -> int:
    """Bytes of a token's record: 16, and 12 for each of the most probable tokens."""
    return _record(num_top).size


@lru_cache(maxsize=64)
def _record(num_top: int) -> struct.Struct:
    return struct.Struct(f"<{2 + num_top}i{1 + num_top}d")


def _fields(score: TokenLogprobs | None, num_top: int) -> Iterable[float]:
    if score is None:
        return (NOTHING, 0, *[NOTHING] * num_top, *[0.0] * (1 + num_top))
    unused = num_top - len(score.top)
    ids = chain((top_id for top_id, _ in score.top), [NOTHING] * unused)
    logprobs = chain((logprob for _, logprob in score.top), [0.0] * unused)
    return (score.token_id, score.rank, *ids, score.logprob, *logprobs)
