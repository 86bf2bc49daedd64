"""Packed log-probabilities are the ones that were packed, whatever their number and shape."""

import pickle
from array import array

import pytest

from pagebrain.outputs import OutputDelta, TokenLogprobs
from pagebrain.server.link.samples import PackedSample
from pagebrain.server.link.scores import Scores, record_bytes

NONE = float("-inf")
ALIKE = [TokenLogprobs(7, -0.1, 1, ((7, -0.1), (50256, -2.5))), TokenLogprobs(3, NONE, 50257, ((1, -0.25), (2, NONE)))]
BARE = [TokenLogprobs(5, -1.0 / 3, 9), TokenLogprobs(6, -2.0 / 3, 10)]
MIXED = [None, ALIKE[0], BARE[0], TokenLogprobs(8, -1.0, 2, ((4, -0.5),)), None]


@pytest.mark.parametrize("scores", [ALIKE, BARE, MIXED, [None], []], ids=["alike", "bare", "mixed", "none", "empty"])
def test_what_is_unpacked_is_what_was_packed(scores: list[TokenLogprobs | None]) -> None:
    packed = Scores.pack(tuple(scores))
    assert list(packed) == scores and len(packed) == len(scores)
    assert [packed[index] for index in range(len(scores))] == scores
    assert [packed[index] for index in range(-len(scores), 0)] == scores
    for start in range(len(scores) + 1):
        for stop in range(len(scores) + 2):
            assert list(packed[start:stop]) == scores[start:stop]
    assert list(pickle.loads(pickle.dumps(packed))) == scores


def test_an_index_beyond_the_end_and_a_step_are_errors() -> None:
    packed = Scores.pack(ALIKE)
    with pytest.raises(IndexError, match="there are 2 scores, got index 2"):
        packed[2]
    with pytest.raises(ValueError, match="step 1, got 2"):
        packed[::2]


def test_joined_scores_are_one_after_the_other_whatever_their_width() -> None:
    assert list(Scores.joined([Scores.pack(BARE), (), tuple(ALIKE), Scores.pack(BARE)])) == [*BARE, *ALIKE, *BARE]
    assert list(Scores.joined([])) == []


def test_a_record_takes_16_bytes_and_12_for_each_of_the_most_probable() -> None:
    assert [record_bytes(num_top) for num_top in (0, 1, 20)] == [16, 28, 256]
    assert len(Scores.pack(ALIKE).data) == 2 * record_bytes(2)


def test_a_sample_is_its_deltas_one_after_the_other_and_says_what_it_takes() -> None:
    sample = PackedSample()
    prompt = (None, BARE[0])
    taken = [
        sample.add(OutputDelta("r", 1, "é", (7,), (ALIKE[0],), prompt_logprobs=prompt)),
        sample.add(OutputDelta("r", 1, "🙂", (3,), Scores.pack(ALIKE[1:]))),
        sample.add(OutputDelta("r", 1, "", (5,), (BARE[0],), "stop", 5)),
    ]
    assert taken == [2 + 4 + 40, 4 + 4 + 40, 4 + 16]
    whole = sample.whole("r", 1)
    assert (whole.request_id, whole.index, whole.text, whole.token_ids) == ("r", 1, "é🙂", array("i", [7, 3, 5]))
    assert list(whole.logprobs) == [*ALIKE, BARE[0]] and list(whole.prompt_logprobs or ()) == list(prompt)
    assert (whole.finish_reason, whole.stop_reason) == ("stop", 5)
