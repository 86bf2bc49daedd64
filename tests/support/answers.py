"""The answer of a task that asks to measure and explain: its form, and its number within bounds."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from tests.support.hints import hint

MIN_WORDS = 8
"""How many different words a text must have."""


def assert_text(name: str, text: object) -> None:
    """``text``, the explanation that ``name`` returned, is a ``str`` of at least ``MIN_WORDS`` different words.

    Upper and lower case, and the signs around a word, make no difference.
    """
    assert isinstance(text, str), f"{name}: the second value is of type {type(text).__name__}, expected a str"
    num_words = len(set(re.findall(r"\w+", text.lower())))
    assert num_words >= MIN_WORDS, f"{name}: the text has {num_words} different words, expected at least {MIN_WORDS}"


def assert_answer(
    answer: Callable[[], Any],
    expected: float,
    within: float,
    record: Callable[[str, object], None],
    hints: dict[str, str],
    looks_like: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """``answer()`` is a number within ``within`` of ``expected`` and a text, which ``record`` gives to the instructor.

    ``hints`` has two: ``"high"`` is shown for a number that is too high, ``"low"`` for one that is too low. If the answer is
    a whole number, it has a third: ``"fraction"`` is shown for one that is not whole. ``looks_like`` has hints for known
    mistakes, each with the numbers that they give; 2 % more or less are shown the hint too. No message tells ``expected``,
    because it could be copied.
    """
    name = answer.__name__
    with hint("Return a pair: the number that was measured, and your explanation as one string."):
        returned = answer()
        assert isinstance(returned, tuple) and len(returned) == 2, (
            f"{name} returned {returned!r:.60}, expected a number and a text"
        )
        number, text = returned
        assert isinstance(number, Real) and not isinstance(number, bool), (
            f"{name}: the first value is of type {type(number).__name__}, expected a number"
        )
    with hint("The text is for your instructor: say why, in one to four sentences."):
        assert_text(name, text)
    record("answer", text)
    if "fraction" in hints:
        with hint(hints["fraction"]):
            assert float(number).is_integer(), f"{name}: {number} is not a whole number"
    high = float(number) > expected
    mistakes = (looks_like or {}).items()
    known = [told for told, numbers in mistakes if any(math.isclose(number, other, rel_tol=0.02) for other in numbers)]
    with hint(known[0] if known else hints["high" if high else "low"]):
        assert abs(float(number) - expected) <= within, f"{name}: {number} is too {'high' if high else 'low'}"
