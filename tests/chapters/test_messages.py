"""What a learner is told of a mistake (chapters 02, 06 and 07): the first message, its line and its hint name it."""

from pathlib import Path

import pytest

from chapters.course.catalog import find_chapters
from tests.support.judging import Verdict, judge
from tests.support.kernels import kernel_device, require_kernels
from tests.support.overlay import Overlay, compose, read_overlays

HERE = Path(__file__).parent
CHAPTERS = {chapter.number: chapter for chapter in find_chapters()}

TOLD = {
    ("02", "out_of_blocks_for_a_negative_count"): (
        "must raise BlockError, but raised OutOfBlocksError",
        "",
        "if the call is a mistake of the caller",
    ),
    ("02", "block_error_for_too_few_blocks"): (
        "must raise OutOfBlocksError, but raised BlockError",
        "",
        "if the call is correct, but more blocks are asked for",
    ),
    ("02", "key_error"): ("must raise BlockError, but raised KeyError", "", "Block ids run from 0 to num_blocks - 1"),
    ("02", "empty_call_without_a_table"): ("expected []", "", "without a table covers 0 tokens, so slots(seq, 0, 0)"),
    ("02", "only_the_additional_requests"): ("10 is too low", "", "the total n, not how many more than six"),
    ("02", "one_request_too_many"): ("17 is too high", "", "the last n that succeeds, not the first that fails"),
    ("02", "fraction_of_a_request"): ("15.6 is not a whole number", "", "An average over the steps does not tell"),
    ("02", "eight_times_one_word"): ("the text has 1 different words, expected at least 8", "", "The text is for"),
    ("06", "zeros_without_dtype"): ("'dtype'", "acc = tl.zeros([PADDED_DIM])", "a shape is a list"),
    ("06", "zeros_of_a_number"): ("not iterable", "acc = tl.zeros(PADDED_DIM, tl.float32)", "a shape is a list"),
    ("06", "row_pitch_of_the_padding"): ("past the end of acc_ptr", "rows[:, None] * PADDED_DIM", "HEAD_DIM apart"),
    ("06", "rows_by_padded_splits"): ("past the end of maximum_ptr", "", "begin `num_splits` rows further"),
    ("06", "maximum_begins_at_zero"): ("got 0, expected -", "", "begin at minus infinity"),
    ("06", "scores_of_nothing"): ("got 0, expected -", "", "scores minus infinity"),
    ("06", "total_without_weight"): ("the merged outputs", "", "bring all to the largest"),
    ("06", "bytes_as_an_intensity"): ("58912 is too high", "", "looks like the number of bytes"),
    ("06", "intensity_without_a_text"): ("the text has 0 different words", "", "The text is for your instructor"),
    ("06", "intensity_alone"): ("expected a number and a text", "", "Return a pair"),
    ("07", "num_sent_kept"): ("should be [58, 55, 54] but is [58, 57, 56]", "", "release must also forget num_sent"),
    ("07", "row_not_put_back"): ("did not put row 1 back into `free`", "", "The row goes back to `free`"),
    ("07", "blocks_from_column_zero"): ("58 is a block of the table", "", "BLOCKS + page"),
    ("07", "rows_counted_on_the_host"): (
        "torch.arange without `device`",
        "torch.arange(len(sampled))",
        "device=rows.device",
    ),
    ("07", "a_number_written_by_index"): (
        "a number came from the host",
        "rows.context_lens[rows.dummy_row] = 0",
        "`zero_()`",
    ),
    ("07", "position_one_too_low"): ("index -1 is out of bounds", "tables.gather", "`context_lens` itself"),
    ("07", "first_rows_grow"): ("Instead row 0 changed, which is not active: `active_rows` names the rows", "", ""),
    ("07", "dummy_taken_back_by_one"): ("the dummy sequence is -1 afterwards, and must be 0", "", "whatever it was"),
    ("07", "slot_without_the_block_size"): ("nothing was written into the slot", "", "block * block_size + offset"),
    ("07", "victim_retired_by_the_cache"): ("never given to `self.retirement.retire`: [2]", "", "self.retirement.retire"),
    ("07", "victim_freed_at_once"): ("never given to `self.retirement.retire`: [2]", "", "self.retirement.retire"),
    ("07", "from_the_start_of_the_step"): ("472.8 is too low", "", "from the start of a step"),
    ("07", "mean_gap"): ("502.9 is too high", "", "the mean of the gaps"),
    ("07", "gap_without_a_text"): ("the text has 0 different words", "", "The text is for your instructor"),
}
"""Chapter and name of a wrong solution -> words of the message, of the line that is shown, and of the hint."""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Verdict]:
    """What the tests of its task say of each."""
    require_kernels(kernel_device())
    overlays: dict[tuple[str, str], Overlay] = {
        (path.stem[2:4], overlay.name): overlay
        for folder in ("wrong", "raising")
        for number in {number for number, _ in TOLD}
        for path in [HERE / folder / f"ch{number}.py"]
        if path.is_file()
        for overlay in read_overlays(path)
    }
    files: dict[Path, tuple[str, str | None]] = {}
    for number, name in TOLD:
        overlay = overlays[number, name]
        path = tmp_path_factory.mktemp(f"ch{number}") / f"{name}.py"
        path.write_text(compose(CHAPTERS[number].source, overlay.source), encoding="utf-8")
        files[path] = number, overlay.task
    judged = judge(tmp_path_factory.mktemp("verdicts"), files)
    return {key: judged[path] for key, path in zip(TOLD, files, strict=True)}


@pytest.mark.parametrize(("number", "name"), TOLD, ids=[f"ch{number}-{name}" for number, name in TOLD])
def test_the_first_message_names_the_mistake(number: str, name: str, verdicts: dict[tuple[str, str], Verdict]) -> None:
    first = verdicts[number, name].failures[0]
    for what, words in zip(("message", "where", "hint"), TOLD[number, name], strict=True):
        assert words in first[what], f"{what}: {first[what]!r}"
    assert "dtype is" not in first["message"], "its numbers are wrong, and its dtype is right"


@pytest.mark.parametrize(
    "name",
    [
        "only_the_additional_requests",
        "one_request_too_many",
        "fraction_of_a_request",
        "bytes_as_an_intensity",
        "from_the_start_of_the_step",
        "mean_gap",
    ],
)
def test_no_message_tells_the_answer(name: str, verdicts: dict[tuple[str, str], Verdict]) -> None:
    number = next(number for number, other in TOLD if other == name)
    first = verdicts[number, name].failures[0]
    told = first["message"] + first["hint"]
    assert not any(answer in told for answer in ("16", "0.83", "497", "expected about"))
