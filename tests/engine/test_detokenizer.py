"""Streamed text equals Hugging Face's decode of the whole, character by character, and ends before a stop string."""

import random
from itertools import pairwise
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from pagebrain.engine.detokenizer import Detokenizer, TextStream
from pagebrain.errors import InvalidRequestError, ModelLoadError
from pagebrain.sampling_params import SamplingParams

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox doesn't.",
    "Voilà un café crème, s'il vous plaît: ça coûte 3 €.",
    "Grüße aus Köln! 你好，世界。こんにちは世界。",
    "Emoji: 😀 😀 👩‍👩‍👧 🇩🇪 🎉🎉🎉\n\n\tindented   text",
]
EXTRA_TOKENS = 5
"""Ids past the tokenizer's vocabulary, which a padded model may produce."""


def byte_level_tokenizer() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_special_tokens(["<|pad|>"])
    # Added tokens are plain text, except that one written in byte-level characters only is read as bytes: the last is "é".
    backend.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("⟦ünïcode⟧"), AddedToken("Ã©")])
    return backend


hugging_face: Any = transformers  # its tokenizer classes are untyped
TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    "generic": hugging_face.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), eos_token="<|endoftext|>", pad_token="<|pad|>"
    ),
    "gpt2": hugging_face.GPT2TokenizerFast(tokenizer_object=byte_level_tokenizer()),
}
TOKENIZER = TOKENIZERS["generic"]
DETOKENIZER = Detokenizer(TOKENIZER)
NUM_IDS = len(TOKENIZER)
EOS: int = TOKENIZER.backend_tokenizer.token_to_id("<|endoftext|>")

any_ids = st.lists(st.integers(0, NUM_IDS + EXTRA_TOKENS - 1), max_size=60)
texts = st.text(max_size=40) | st.text(alphabet="ab é€😀\u200d\ufffd", max_size=40)


def reference(ids: list[int], skip_special_tokens: bool = True) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def run(stream: TextStream, ids: list[int]) -> list[str]:
    """What each token brought, then what ``finish`` brought; stops as the engine does."""
    pieces = []
    for token_id in ids:
        pieces.append(stream.append(token_id))
        if stream.stopped_by is not None:
            break
    return [*pieces, stream.finish()]


# Whole sequences and streams ------------------------------------------------------------------------------------------


@given(ids=any_ids, skip=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_stream_and_decode_equal_hugging_face_on_any_token_ids(ids: list[int], skip: bool) -> None:
    stream = DETOKENIZER.stream(SamplingParams(skip_special_tokens=skip))
    assert "".join(run(stream, ids)) == stream.text == DETOKENIZER.decode(ids, skip) == reference(ids, skip)


@given(text=texts)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_streamed_text_is_always_a_beginning_of_the_whole(text: str) -> None:
    # So no U+FFFD is shown for a character that a later token completes.
    ids, stream = encode(text), DETOKENIZER.stream(SamplingParams(skip_special_tokens=False))
    whole = text.replace("Ã©", "é")  # the added token that is read as bytes
    for token_id in ids:
        stream.append(token_id)
        assert whole.startswith(stream.text)
    assert stream.text == whole and stream.finish() == ""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_single_token_decodes_as_in_hugging_face(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    detokenizer = Detokenizer(tokenizer)
    for token_id in range(len(tokenizer) + EXTRA_TOKENS):
        for skip in (True, False):
            expected = tokenizer.decode([token_id], skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert detokenizer.decode([token_id], skip) == expected


def test_a_character_appears_with_the_token_that_completes_it() -> None:
    ids = encode("🐘")
    assert len(ids) == 3  # bytes F0 9F, 90, 98
    assert run(DETOKENIZER.stream(SamplingParams()), ids) == ["", "", "🐘", ""]


def test_bytes_that_nothing_completes_become_replacement_characters() -> None:
    (start, middle, end), letter = encode("🐘"), encode("a")[0]
    assert run(DETOKENIZER.stream(SamplingParams()), [start, middle, letter]) == ["", "", "\ufffda", ""]
    assert run(DETOKENIZER.stream(SamplingParams()), [start, middle]) == ["", "", "\ufffd"]
    assert run(DETOKENIZER.stream(SamplingParams()), [end, end]) == ["\ufffd", "\ufffd", ""]


def test_special_tokens_are_left_out_or_shown() -> None:
    ids = [*encode("a"), EOS, *encode("<tool call>"), *encode("⟦ünïcode⟧")]
    assert len(ids) == 4
    assert DETOKENIZER.decode(ids) == "a<tool call>⟦ünïcode⟧"
    assert DETOKENIZER.decode(ids, skip_special_tokens=False) == "a<|endoftext|><tool call>⟦ünïcode⟧"


def test_ids_that_are_no_token_ids_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="got -1"):
        DETOKENIZER.decode([-1])


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Metaspace()])
def test_tokenizers_that_are_not_byte_level_are_refused(decoder: Any) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ModelLoadError, match="not a fast byte-level tokenizer"):
        Detokenizer(hugging_face.PreTrainedTokenizerFast(tokenizer_object=backend))


# Stop strings ---------------------------------------------------------------------------------------------------------


def expected_with_stops(pieces: list[str], params: SamplingParams) -> tuple[str, str | None]:
    """The rule, character by character: ``pieces[i]`` is what token ``i`` adds to the text."""
    text = ""
    for index, piece in enumerate(pieces):
        for character in piece:
            text += character
            ending = [stop for stop in params.stop if text.endswith(stop)]
            if ending and index >= params.min_tokens:
                stop = max(ending, key=len)
                return (text if params.include_stop_str_in_output else text[: len(text) - len(stop)]), stop
    return text, None


@st.composite
def stopped_streams(draw: st.DrawFn) -> tuple[list[int], SamplingParams]:
    text = draw(st.text(alphabet="ab é😀", max_size=30))
    ids = encode(text) if draw(st.booleans()) else [i for c in text for i in encode(c)]
    stops = draw(st.lists(st.text(alphabet="ab é😀", min_size=1, max_size=5), min_size=1, max_size=3))
    if text and draw(st.booleans()):
        start = draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + draw(st.integers(1, 6))])
    params = SamplingParams(
        stop=tuple(stops),
        min_tokens=draw(st.integers(0, 4)),
        include_stop_str_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
    )
    return ids, params


@given(case=stopped_streams())
@settings(max_examples=600, deadline=None, derandomize=True)
def test_text_ends_before_the_first_stop_string_and_nothing_is_ever_taken_back(
    case: tuple[list[int], SamplingParams],
) -> None:
    ids, params = case
    plain = DETOKENIZER.stream(SamplingParams(skip_special_tokens=params.skip_special_tokens))
    expected, stop = expected_with_stops(run(plain, ids), params)
    stream = DETOKENIZER.stream(params)
    emitted = ""
    for piece in run(stream, ids):
        emitted += piece
        assert expected.startswith(emitted)
    assert (emitted, stream.text, stream.stopped_by) == (expected, expected, stop)


def test_the_cases_above_include_every_kind() -> None:
    # Stop strings over several tokens, in the middle of one, and beginnings of one that turn out to be none.
    for text, stop, shown in (
        ("The lazy dog", "zy d", "The la"),
        ("The quick brown", "row", "The quick b"),
        ("The quick brown", "quite", "The quick brown"),
    ):
        stream = DETOKENIZER.stream(SamplingParams(stop=(stop,)))
        assert "".join(run(stream, encode(text))) == shown
        assert (stream.stopped_by is not None) == (shown != text)


def test_the_possible_beginning_of_a_stop_string_is_held_back_until_it_is_decided() -> None:
    ids = [encode(character)[0] for character in "xENENDy"]
    assert run(DETOKENIZER.stream(SamplingParams(stop=("ENDE",))), ids) == ["x", "", "", "EN", "", "", "ENDy", ""]


def test_a_beginning_of_a_stop_string_is_shown_when_the_sequence_ends() -> None:
    stream = DETOKENIZER.stream(SamplingParams(stop=("END",)))
    assert run(stream, encode("E") + encode("N")) == ["", "", "EN"]
    assert stream.stopped_by is None and stream.text == "EN"


@pytest.mark.parametrize(("include", "shown"), [(False, "a "), (True, "a stop")])
def test_the_stop_string_is_shown_if_asked_for_and_text_after_it_never(include: bool, shown: str) -> None:
    stream = DETOKENIZER.stream(SamplingParams(stop=("stop",), include_stop_str_in_output=include))
    for character in "a stop and more":
        stream.append(encode(character)[0])
    assert stream.finish() == "" and stream.text == shown and stream.stopped_by == "stop"


def test_of_several_stop_strings_the_one_that_is_complete_first_counts() -> None:
    def stop_in(text: str, *stops: str) -> tuple[str, str | None]:
        stream = DETOKENIZER.stream(SamplingParams(stop=stops))
        whole = run(stream, encode(text))
        return "".join(whole), stream.stopped_by

    assert stop_in("one two three", "three", "two") == ("one ", "two")
    assert stop_in("one two three", "two three", "tw") == ("one ", "tw")
    assert stop_in("one two three", "o", "two") == ("", "o")
    assert stop_in("xtwo", "o", "two", "wo") == ("x", "two")  # complete at the same character: the longest


def test_stop_strings_do_not_end_a_text_before_min_tokens() -> None:
    ids = [encode(character)[0] for character in "abcabc"]

    def text(min_tokens: int) -> str:
        return "".join(run(DETOKENIZER.stream(SamplingParams(stop=("bc",), min_tokens=min_tokens)), ids))

    assert [text(n) for n in range(7)] == ["a", "a", "a", "abca", "abca", "abca", "abcabc"]


def test_a_stop_string_may_wait_for_the_last_byte_of_a_character() -> None:
    stream = DETOKENIZER.stream(SamplingParams(stop=("é🐘",)))
    ids = [*encode("xé"), *encode("🐘"), *encode("y")]
    assert "".join(run(stream, ids)) == "x" and stream.stopped_by == "é🐘"


def test_a_long_stream_holds_back_less_than_a_stop_string() -> None:
    # It is all that is searched again, so a token costs the same however long the text is.
    stream = DETOKENIZER.stream(SamplingParams(stop=("ab😀", "zzz")))
    rng = random.Random(0)
    for token_id in (rng.randrange(NUM_IDS) for _ in range(2000)):
        stream.append(token_id)
        assert len(stream._held_back) < 3
        if stream.stopped_by is not None:
            break
    assert stream.stopped_by is None and len(stream.text) > 2000


def test_pieces_join_to_the_text_however_often_it_is_read() -> None:
    stream, seen = DETOKENIZER.stream(SamplingParams()), [""]
    for token_id in encode("The quick brown fox"):
        stream.append(token_id)
        seen.append(stream.text)
    assert all(later.startswith(earlier) and later != earlier for earlier, later in pairwise(seen))
    assert stream.text == "The quick brown fox"
