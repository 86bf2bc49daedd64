"""The renderers draw what the traces say: counted in what they draw and read in the alt texts, on real and made-up runs."""

import base64
import functools
import io
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from pagebrain import LLM, SamplingParams
from pagebrain.engine.sequence import ScheduledSequence
from pagebrain.engine.trace import StepTrace, TraceRow
from tests.support.models import random_gpt2

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Polygon, Rectangle  # noqa: E402
from PIL import Image  # noqa: E402

from pagebrain import viz  # noqa: E402
from pagebrain.viz import state, style  # noqa: E402
from pagebrain.viz.attention import convergence, slot_weights  # noqa: E402
from pagebrain.viz.source import Source, without_markers, without_solutions  # noqa: E402

MAX_PNG_BYTES = 80_000


def row(seq_id: int, start: int, num_tokens: int, samples: bool = True) -> TraceRow:
    return TraceRow(seq_id, str(seq_id), 0, start, num_tokens, samples, "decode" if num_tokens == 1 else "prefill")


def step(number: int, rows: list[TraceRow], tables: dict[int, tuple[int, ...]], **queues: Any) -> StepTrace:
    """A step in a pool of 8 blocks of 4 slots."""
    held = Counter(block_id for table in tables.values() for block_id in table)
    shared = {block_id: count for block_id, count in held.items() if count > 1}
    free = tuple(block_id for block_id in range(8) if block_id not in held)
    return StepTrace(number, tuple(rows), tables, free, shared, 8, 4, **queues)


HAND_MADE = [
    # A prefills 6 tokens; B gets 3 of its 5.
    step(0, [row(0, 0, 6), row(1, 0, 3, samples=False)], {0: (3, 7), 1: (1, 2)}, running=(0, 1), waiting=(2,)),
    # A decodes; B is not in the step, and keeps its 3 tokens.
    step(1, [row(0, 6, 1)], {0: (3, 7), 1: (1, 2)}, running=(0, 1), waiting=(2,)),
    # B loses its blocks; A ends.
    step(2, [row(0, 7, 1)], {0: (3, 7)}, running=(0,), waiting=(1, 2), preempted=(1,), finished=(0,)),
    # B comes back with all of its tokens, from the start.
    step(3, [row(1, 0, 5)], {1: (7, 3)}, running=(1,), waiting=(2,)),
]


@pytest.fixture(scope="module")
def run() -> list[StepTrace]:
    """A real run in a pool so small that a sequence is preempted."""
    base = random_gpt2(n_positions=128, eos_token_id=None)
    llm = LLM(base, num_blocks=14, block_size=4, max_num_batched_tokens=8, max_num_seqs=4)
    traces: list[StepTrace] = []
    llm.engine.observers.append(traces.append)
    prompts = [[(7 * i + j) % 90 for j in range(length)] for i, length in enumerate((5, 13, 3))]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False)
    assert any(trace.preempted for trace in traces), "the run that these tests are about has a preemption"
    return traces


def cells(figure: Figure, axes: int = 0) -> list[Rectangle]:
    """The outlines of the blocks drawn: one for each, free or held."""
    patches = figure.axes[axes].patches
    return [patch for patch in patches if isinstance(patch, Rectangle) and patch.get_linewidth() > 0]


def filled(figure: Figure, axes: int = 0) -> dict[tuple[int, int], tuple[str, float]]:
    """``(row, column)`` of each filled part -> its colour and width."""
    found = {}
    for patch in figure.axes[axes].patches:
        if isinstance(patch, Rectangle) and patch.get_linewidth() == 0 and patch.get_hatch() is None:
            place = round(patch.get_y()), round(patch.get_x())
            found[place] = to_hex(patch.get_facecolor()).upper(), patch.get_width()
    return found


# What the traces say --------------------------------------------------------------------------------------------------


def test_memory_of_a_hand_made_run_is_exact() -> None:
    assert state.memory(HAND_MADE) == [(0, 16, 9), (1, 16, 10), (2, 8, 8), (3, 8, 5)]
    assert state.mean_waste(state.memory(HAND_MADE)) == pytest.approx(1 - 32 / 48)


def test_a_sequence_that_pauses_keeps_its_length_and_loses_it_with_its_blocks() -> None:
    assert viz.cached_lengths(HAND_MADE) == [{0: 6, 1: 3}, {0: 7, 1: 3}, {0: 8}, {1: 5}]


def test_used_slots_never_exceed_reserved_ones_and_match_the_cached_tokens(run: list[StepTrace]) -> None:
    for trace, point, lengths in zip(run, state.memory(run), viz.cached_lengths(run), strict=True):
        assert point.used <= point.reserved <= trace.num_blocks * trace.block_size
        assert point.used == sum(lengths.values())
        assert point.reserved == (trace.num_blocks - len(trace.free_blocks)) * trace.block_size


def test_a_shared_block_counts_once() -> None:
    trace = step(0, [row(0, 0, 6), row(1, 0, 7)], {0: (3, 7), 1: (3, 1)})
    assert state.memory([trace]) == [(0, 12, 4 + 2 + 3)]
    assert state.holders(trace) == {3: (0, 1), 7: (0,), 1: (1,)}


def test_marks_of_a_hand_made_run_are_exact() -> None:
    kinds = {
        seq_id: [marks[i].kind if i in marks else None for i in range(4)] for seq_id, marks in state.marks(HAND_MADE).items()
    }
    assert kinds == {
        0: ["prefill", "decode", "decode", None],
        1: ["prefill", "idle", "preempted", "prefill"],
        2: ["waiting"] * 4,
    }
    assert [mark.ends for mark in state.marks(HAND_MADE)[0].values()] == [False, False, True]


def test_a_mark_has_the_phase_of_its_row() -> None:
    """Query length alone tells prefill from decode, for pictures as everywhere."""
    marks = state.marks([step(0, [row(0, 0, 1, samples=False)], {0: (1,)}), step(1, [row(0, 1, 2)], {0: (1,)})])
    assert [mark.kind for mark in marks[0].values()] == ["decode", "prefill"]


@pytest.mark.parametrize(
    ("seq_id", "name"), [(0, "A"), (25, "Z"), (26, "AA"), (51, "AZ"), (52, "BA"), (701, "ZZ"), (702, "AAA")]
)
def test_sequences_are_named_like_the_columns_of_a_sheet(seq_id: int, name: str) -> None:
    assert state.letter(seq_id) == name


# The pool and the tables ----------------------------------------------------------------------------------------------


def test_every_block_is_drawn_in_its_holders_colour_and_as_full_as_it_is(run: list[StepTrace]) -> None:
    for trace, lengths in zip(run, viz.cached_lengths(run), strict=True):
        picture = viz.pool_map(trace, columns=8, lengths=lengths)
        assert len(cells(picture.figure)) == trace.num_blocks
        owner = {block_id: seq_id for seq_id, table in trace.block_tables.items() for block_id in table}
        fill = state.block_fill(trace, lengths)
        drawn = {line * 8 + column: look for (line, column), look in filled(picture.figure).items()}
        assert drawn.keys() == owner.keys()
        for block_id, (colour, width) in drawn.items():
            assert colour == style.sequence_colour(owner[block_id])
            assert width == pytest.approx(0.94 * fill[block_id] / trace.block_size)


def test_block_tables_show_physical_ids_in_logical_order(run: list[StepTrace]) -> None:
    trace = max(run, key=lambda trace: len(trace.block_tables))
    axes = viz.block_tables(trace).figure.axes[0]
    texts = sorted((text.get_position()[1], text.get_position()[0], text.get_text()) for text in axes.texts)
    assert [int(text) for _, _, text in texts] == [
        b for seq_id in sorted(trace.block_tables) for b in trace.block_tables[seq_id]
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == [state.letter(i) for i in sorted(trace.block_tables)]


def test_marked_blocks_have_a_thick_frame_in_every_table() -> None:
    trace = step(0, [row(0, 0, 6), row(1, 0, 7)], {0: (3, 7), 1: (3, 1)})
    picture = viz.block_tables(trace, marked=(3,))
    frames = [patch for patch in picture.figure.axes[0].patches if patch.get_linewidth() > 3]
    assert [round(frame.get_xy()[0]) for frame in cast(Any, frames)] == [0, 0]
    assert picture.alt.endswith("Marked blocks: 3.") and "Marked" not in viz.block_tables(trace).alt


def test_a_pool_in_one_line_numbers_its_cells_below_and_takes_a_title() -> None:
    trace = replace(step(0, [row(0, 0, 2)], {0: (5, 9)}), num_blocks=32, block_size=1)
    axes = viz.pool_map(trace, columns=32, title="32 slots").figure.axes[0]
    assert [text.get_text() for text in axes.texts if text.get_text().isdigit()] == [str(slot) for slot in range(32)]
    assert axes.get_title(loc="left") == "32 slots"


def test_pool_and_tables_share_a_figure_on_demand() -> None:
    picture = viz.block_tables(HAND_MADE[0], with_pool=True, names={0: "short"})
    tables, pool = picture.figure.axes
    assert len(cells(picture.figure, 0)) == 4 and len(cells(picture.figure, 1)) == 8
    assert [label.get_text() for label in tables.get_yticklabels()] == ["A short", "B"]


def test_a_shared_block_shows_both_holders_and_a_corner() -> None:
    trace = step(0, [row(0, 0, 6), row(1, 0, 7), row(2, 0, 4)], {0: (3, 7), 1: (3, 1), 2: (3,)})
    axes = viz.pool_map(trace, columns=8).figure.axes[0]
    corners = [patch for patch in axes.patches if isinstance(patch, Polygon) and not isinstance(patch, Rectangle)]
    assert len(corners) == 1
    assert "A+2" in [text.get_text() for text in axes.texts]
    assert viz.pool_map(trace).alt.endswith("Shared blocks: 3 by 3 sequences.")


def test_a_reservation_is_a_pool_of_long_blocks() -> None:
    trace = StepTrace(4, (row(0, 8, 1), row(1, 30, 1)), {0: (0,), 1: (1,)}, (), {}, 2, 60)
    widths = {place: width for place, (_, width) in filled(viz.pool_map(trace).figure).items()}
    assert widths == {(0, 0): pytest.approx(0.996 * 9 / 60), (1, 0): pytest.approx(0.996 * 31 / 60)}


@pytest.mark.parametrize("num_blocks", [1, 7, 200, 1500])
def test_a_pool_of_any_size_is_drawn_whole(num_blocks: int) -> None:
    trace = StepTrace(0, (row(0, 0, 3),), {0: (0,)}, tuple(range(1, num_blocks)), {}, num_blocks, 16)
    picture = viz.pool_map(trace)
    assert len(cells(picture.figure)) == num_blocks
    assert len(picture.png()) < MAX_PNG_BYTES


# Steps ----------------------------------------------------------------------------------------------------------------


def boxes(figure: Figure) -> int:
    return sum(len(collection.get_paths()) for collection in figure.axes[0].collections)


def test_a_timeline_has_a_box_for_every_mark_and_a_number_for_every_prefill(run: list[StepTrace]) -> None:
    figure = viz.timeline(run).figure
    marks = [mark for row in state.marks(run).values() for mark in row.values()]
    assert boxes(figure) == len(marks)
    numbers = Counter(text.get_text() for text in figure.axes[0].texts)
    assert numbers == Counter(str(mark.num_tokens) for mark in marks if mark.kind == "prefill")
    assert len(figure.axes[0].lines) == sum(mark.ends for mark in marks) == 3


def test_a_timeline_counts_every_row_of_the_run(run: list[StepTrace]) -> None:
    marks = [mark for row in state.marks(run).values() for mark in row.values()]
    assert sum(mark.num_tokens for mark in marks) == sum(trace.num_tokens for trace in run)
    assert Counter(mark.kind for mark in marks)["preempted"] == sum(len(trace.preempted) for trace in run) > 0


def test_a_preemption_is_seen_and_told(run: list[StepTrace]) -> None:
    picture = viz.timeline(run)
    victim = next((trace.step, trace.preempted[0]) for trace in run if trace.preempted)
    assert f"preempted in step {victim[0]}" in picture.alt.partition(f"{state.letter(victim[1])}: ")[2].partition(". ")[0]
    assert "preempted" in [text.get_text() for text in picture.figure.legends[0].get_texts()]


def test_two_runs_are_compared_row_by_row() -> None:
    """B computes 8 tokens and then decodes; in the second run it finds 4 of them, and its second row is gone."""
    table = {0: (1,), 1: (2, 3)}
    before = [step(0, [row(0, 0, 4), row(1, 0, 4, samples=False)], table), step(1, [row(1, 4, 4)], table, finished=(1,))]
    after = [step(0, [row(0, 0, 4), row(1, 4, 4)], table, finished=(1,))]
    picture = viz.compare_traces(before, after, ("off", "on"))
    upper, lower = picture.figure.axes
    assert upper.get_title(loc="left") == "off: 2 steps, 3 rows, 12 tokens computed"
    assert lower.get_title(loc="left") == "on: 1 steps, 2 rows, 8 tokens computed"
    frames = [patch for patch in lower.patches if isinstance(patch, Rectangle) and patch.get_linestyle() == "--"]
    assert [(round(frame.get_x() + 0.5), round(frame.get_y() + 0.42)) for frame in frames] == [(1, 1)]
    assert "B 8 and 4" in picture.alt and "1 rows of the first run" in picture.alt and "A " not in picture.alt
    assert upper.get_xlim() == lower.get_xlim()
    assert picture.png() == viz.compare_traces(before, after, ("off", "on")).png()


def test_a_run_compared_with_itself_has_no_frames(run: list[StepTrace]) -> None:
    picture = viz.compare_traces(run, run)
    assert not picture.figure.axes[1].patches and "Each sequence computes as much." in picture.alt
    assert len(viz.compare_traces([], []).alt) > 40 and len(picture.png()) < MAX_PNG_BYTES


def test_memory_is_drawn_as_computed() -> None:
    figure = viz.memory_over_time(HAND_MADE).figure
    waste, used, reserved = (cast(Any, patch).get_data() for patch in figure.axes[0].patches)
    assert list(waste.baseline) == list(used.values) == [9, 10, 8, 5]
    assert list(waste.values) == list(reserved.values) == [16, 16, 8, 8]
    assert list(used.edges) == [-0.5, 0.5, 1.5, 2.5, 3.5]


def test_runs_are_compared_to_the_same_scale() -> None:
    picture = viz.memory_over_time({"long": HAND_MADE, "short": HAND_MADE[2:3]})
    first, second = picture.figure.axes
    assert first.get_ylim() == second.get_ylim() and first.get_xlim() == second.get_xlim() == (-0.5, 3.5)
    assert picture.alt.startswith("long: over 4 steps up to 16 token slots were held, when 9 were used;")
    assert "short: over 1 steps up to 8 token slots" in picture.alt


@pytest.mark.parametrize("draw", [viz.timeline, viz.memory_over_time])
def test_no_steps_are_no_error(draw: Any) -> None:
    assert draw([]).png()


# Attention ------------------------------------------------------------------------------------------------------------


def attention_pages() -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    """Two pages of four slots, the last one not seen; with the scores and values of the seven tokens."""
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(8, generator=generator).double(), torch.randn(8, 5, generator=generator).double()
    scores[7] = -math.inf
    pages = []
    for count in (4, 8):
        maximum = scores[:count].max()
        weights = (scores[:count] - maximum).exp()
        pages.append(viz.PageStep(scores[count - 4 : count], maximum, weights.sum(), weights @ values[:count]))
    return pages, scores, values


def test_weights_and_convergence_are_those_of_the_softmax() -> None:
    pages, scores, values = attention_pages()
    steps = [viz.PageStep(p.scores.tolist(), float(p.maximum), float(p.total), p.acc.tolist()) for p in pages]
    assert torch.allclose(torch.tensor(slot_weights(steps)).flatten().double(), scores.softmax(0))
    final = scores.softmax(0) @ values
    first = scores[:4].softmax(0) @ values[:4]
    assert convergence(steps) == [pytest.approx(float((first - final).norm() / final.norm())), 0.0]


def test_attention_is_drawn_page_by_page() -> None:
    pages, scores, _ = attention_pages()
    picture = viz.attention_by_page(pages, block_ids=[5, 2])
    above, middle, below = picture.figure.axes
    tops = [patch.get_y() + patch.get_height() for patch in above.patches]  # type: ignore[attr-defined]
    assert tops[:7] == pytest.approx(scores[:7].tolist())
    assert above.patches[7].get_height() == middle.patches[7].get_height() == 0.0  # type: ignore[attr-defined]
    assert [label.get_text() for label in below.get_xticklabels()] == ["page 0\nblock 5", "page 1\nblock 2"]
    assert "physical blocks 5, 2" in picture.alt and f"{float(pages[1].maximum):.2f}" in picture.alt


def test_several_heads_at_once_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="one head of one query: maximum must be a number"):
        viz.attention_by_page([(torch.zeros(4), torch.zeros(2), 1.0, torch.zeros(3))])
    with pytest.raises(ValueError, match="scores must be a list of numbers"):
        viz.attention_by_page([(torch.zeros(2, 4), 0.0, 1.0, torch.zeros(3))])
    with pytest.raises(ValueError, match="at least one page"):
        viz.attention_by_page([])


# Measurements ---------------------------------------------------------------------------------------------------------


def test_fragmentation_is_in_percent_of_the_sum_and_told() -> None:
    systems = {
        "Max": {"token states": 1.0, "reserved": 1.0, "internal": 2.0},
        "paged": {"token states": 3.0, "internal": 1.0},
    }
    picture = viz.fragmentation_bars(systems, paper={"Max": 20.4})
    widths = [patch.get_width() for patch in picture.figure.axes[0].patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx([25, 25, 50, 0, 75, 0, 25, 0])
    assert "Max: token states 25.0 %, reserved for later tokens 25.0 %, internal fragmentation 50.0 %" in picture.alt
    assert "(paper: token states 20.4 %)" in picture.alt
    with pytest.raises(ValueError, match="inner"):
        viz.fragmentation_bars({"x": {"inner": 1.0}})


def test_latencies_are_drawn_in_milliseconds() -> None:
    picture = viz.latency_by_context({"00": ([16, 64], [0.002, 0.08]), "01": ([16, 64], [0.001, 0.001])})
    axes = picture.figure.axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[2, 80], [1, 1]]  # type: ignore[arg-type]
    assert axes.get_yscale() == "log"
    assert "00 goes from 2 ms at 16 tokens of context to 80 ms at 64" in picture.alt
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 2


def test_throughput_is_told_with_its_latencies() -> None:
    picture = viz.latency_throughput({"static": [(50, 0.5), (90, 2.0)]}, latency="time to first token (s)")
    assert picture.figure.axes[0].get_ylabel() == "time to first token (s)"
    assert (
        picture.alt == "Throughput against time to first token (s): static reaches 90 tokens/s, with values from 0.5 to 2."
    )


def test_the_ladder_has_three_panels_that_say_their_numbers() -> None:
    rows = [
        {"stage": "00", "tokens_per_s": 31, "ms_per_token": 32.4, "kv_bytes": None},
        {"stage": "01", "tokens_per_s": 2100, "ms_per_token": 6.25, "kv_bytes": 151e6},
    ]
    picture = viz.staircase(rows)
    notes = [[text.get_text() for text in axes.texts] for axes in picture.figure.axes]
    assert notes == [["31", "2,100"], ["32.4", "6.25"], ["none", "151"]]
    assert "01: 2,100 tokens/s, 6.25 ms per token, 151 MB of KV cache." in picture.alt


# How they look --------------------------------------------------------------------------------------------------------


def test_neighbouring_sequences_differ_in_luminance() -> None:
    colours = style.SEQUENCE_COLOURS
    steps = [abs(style.luminance(a) - style.luminance(b)) for a, b in zip(colours, (*colours[1:], colours[0]))]
    assert min(steps) >= 0.2, steps


def test_text_on_every_sequence_colour_has_contrast() -> None:
    def relative(colour: str) -> float:  # WCAG 2
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour in style.SEQUENCE_COLOURS:
        light, dark = sorted((relative(colour), relative(style.text_colour(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def pictures(run: list[StepTrace]) -> list[viz.Picture]:
    return [
        viz.pool_map(run[9]),
        viz.block_tables(run[9], with_pool=True),
        viz.memory_over_time({"a": run, "b": run[:20]}),
        viz.timeline(run),
        viz.attention_by_page(attention_pages()[0]),
        viz.latency_by_context({"00": ([16, 64], [0.002, 0.08])}),
        viz.latency_throughput({"static": [(50, 0.5), (90, 2.0)]}),
        viz.fragmentation_bars({"Max": {"token states": 1.0, "reserved": 1.0}}, paper={"Max": 20.4}),
        viz.staircase([{"stage": "00", "tokens_per_s": 31, "ms_per_token": 32, "kv_bytes": None}]),
    ]


def test_the_same_data_give_the_same_bytes_and_small_ones(run: list[StepTrace]) -> None:
    for first, second in zip(pictures(run), pictures(run)):
        png = first.png()
        assert png == first.png() == second.png(), first.alt
        assert len(png) < MAX_PNG_BYTES, first.alt
        assert first.svg() == second.svg(), first.alt


def test_all_letters_are_at_least_nine_points(run: list[StepTrace]) -> None:
    for picture in pictures(run):
        texts = [text for text in picture.figure.findobj(lambda artist: hasattr(artist, "get_fontsize")) if text.get_text()]  # type: ignore[attr-defined]
        assert texts and min(text.get_fontsize() for text in texts) >= 9, picture.alt  # type: ignore[attr-defined]


def test_a_readers_own_matplotlib_settings_neither_matter_nor_change() -> None:
    import matplotlib

    plain = viz.timeline(HAND_MADE).png()
    with matplotlib.rc_context({"font.size": 20, "figure.facecolor": "black"}):
        assert viz.timeline(HAND_MADE).png() == plain
        assert matplotlib.rcParams["font.size"] == 20


# In a notebook --------------------------------------------------------------------------------------------------------


def test_a_notebook_gets_a_png_with_the_alt_text_and_pyplot_knows_of_no_figure() -> None:
    import matplotlib.pyplot as plt

    picture = viz.pool_map(HAND_MADE[0])
    data, metadata = picture._repr_mimebundle_()
    assert metadata["image/png"] == {"alt": picture.alt, "width": 700}
    assert data["text/plain"] == f"Figure: {picture.alt}"
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert image.size[0] == 1008 and image.info["Description"] == picture.alt
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert plt.get_fignums() == []


def test_the_alt_text_of_a_pool_tells_who_holds_what() -> None:
    assert viz.pool_map(HAND_MADE[0]).alt == (
        "Pool of 8 blocks of 4 slots at step 0: sequence A holds blocks 3, 7; sequence B holds blocks 1, 2; 4 free. "
        "9 of the 16 slots in held blocks hold a token."
    )
    assert viz.pool_map(replace(HAND_MADE[0], block_tables={}, rows=())).alt == (
        "Pool of 8 blocks of 4 slots at step 0: no block is held; 8 free. 0 of the 0 slots in held blocks hold a token."
    )


def test_alt_texts_are_copied_to_where_the_site_looks_for_them() -> None:
    output = {"data": {"image/png": ""}, "metadata": {"image/png": {"alt": "A line."}}}
    cells: list[Any] = [
        {"cell_type": "code", "metadata": {}, "outputs": [output]},
        {"cell_type": "markdown", "metadata": {}},
    ]
    assert viz.alt_to_cells({"cells": cells}) == 1
    assert cells[0]["metadata"] == {"mystnb": {"image": {"alt": "A line."}}}
    assert cells[1]["metadata"] == {}


def test_any_figure_can_be_shown_but_not_without_an_alt_text(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("IPython")
    viz.show(Figure(figsize=(1, 1)), "An empty square.")
    assert "Figure: An empty square." in capsys.readouterr().out
    with pytest.raises(ValueError, match="alt text"):
        viz.show(Figure(figsize=(1, 1)))


def test_pictures_are_saved_as_png_and_svg_and_nothing_else(tmp_path: Path) -> None:
    picture = viz.timeline(HAND_MADE)
    for name in ("a.png", "a.svg"):
        picture.save(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == picture.png()
    assert "Timeline of 3 sequences" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match="a.jpg"):
        picture.save(tmp_path / "a.jpg")


# Source code ----------------------------------------------------------------------------------------------------------

CODE = '''def count(n: int) -> int:
    """Count."""
    # BEGIN SOLUTION 2.1
    return n + 1
    # END SOLUTION'''


def test_source_is_shown_without_markers_and_tasks_without_solutions() -> None:
    head = 'def count(n: int) -> int:\n    """Count."""\n'
    assert without_markers(CODE) == head + "    return n + 1"
    assert without_solutions(CODE) == head + "    ...  # task 2.1"
    assert without_solutions(without_markers(CODE)) == head + "    ..."


def test_live_source_is_shown_with_its_place() -> None:
    place, code = viz.show_source(ScheduledSequence.context_len).pieces[0]
    path, _, line = place.partition(":")
    assert path == "pagebrain/engine/sequence.py"
    lines = (Path(__file__).parents[2] / path).read_text().splitlines()
    assert lines[int(line) - 1].strip() == code.splitlines()[0] == "@property"


def test_a_task_of_a_chapter_shows_its_name_and_docstring_and_neither_solution_nor_line_number() -> None:
    from chapters.ch02_block_table import BlockManager

    source = viz.show_task(BlockManager.allocate)
    data = source._repr_mimebundle_()
    assert (
        data["text/markdown"].startswith("`chapters/ch02_block_table.py: BlockManager.allocate`")
        and "```python\ndef allocate" in data["text/markdown"]
    )
    assert "Task 2.1" in repr(source) and "..." in repr(source) and "return" not in repr(source)
    assert "SOLUTION" not in repr(viz.show_source(BlockManager)) + repr(viz.show_task(BlockManager))


def test_a_legend_has_the_marks_of_its_picture_and_a_title_names_the_step() -> None:
    def labels(picture: viz.Picture) -> list[str]:
        return [text.get_text() for legend in picture.figure.legends for text in legend.get_texts()]

    trace = replace(HAND_MADE[0], rows=(), block_tables={1: (0,), 3: (2,)}, free_blocks=(1, 3), num_blocks=4, block_size=1)
    picture = viz.pool_map(trace)
    assert labels(picture) == ["holds tokens", "free"]
    [patch, _] = picture.figure.legends[0].get_patches()
    assert patch.get_facecolor() in [cell.get_facecolor() for cell in picture.figure.axes[0].patches]
    assert labels(viz.pool_map(replace(trace, block_size=2), lengths={1: 1, 3: 2}))[:2] == ["holds tokens", "held, empty"]
    assert viz.block_tables(trace).figure.axes[0].get_title(loc="left").startswith(f"Block tables at step {trace.step}: ")
    assert " at step" in viz.block_tables(trace, with_pool=True).figure.axes[1].get_title(loc="left")


def test_a_task_that_is_solved_with_nested_functions_shows_one_ellipsis() -> None:
    def solved() -> int:
        """Task 9.9: count."""

        @functools.cache
        def first(number: int) -> int:
            return number

        def second() -> int:
            """Of the solution."""
            return first(2)

        return second()

    assert solved() == 2
    [(_, code)] = viz.show_task(solved).pieces
    assert code == 'def solved() -> int:\n    """Task 9.9: count."""\n\n    ...'


def test_a_fenced_block_in_a_docstring_does_not_end_the_fence() -> None:
    data = Source([("a.py:1", 'def f():\n    """\n    ```python\n    ```\n    """')])._repr_mimebundle_()
    assert data["text/markdown"].count("````") == 2


# Terminals ------------------------------------------------------------------------------------------------------------


def text_of(renderable: Any) -> list[str]:
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_terminals_timeline_says_the_same() -> None:
    assert text_of(viz.terminal.timeline(HAND_MADE))[2:] == ["A #==|", "B #-x#", "C wwww"]


def test_the_terminals_timeline_breaks_long_runs_and_keeps_the_end() -> None:
    lines = text_of(viz.terminal.timeline(HAND_MADE, columns=3))
    assert lines[1:] == ["  0", "A #==|", "B #-x", "C www", "  3", "A |", "B #", "C w"]


def test_no_sign_of_the_terminals_timeline_means_a_free_block_in_the_pool() -> None:
    legend = text_of(viz.terminal.timeline(HAND_MADE))[0]
    assert "w waiting" in legend and viz.terminal.FREE not in legend
    assert f"({viz.terminal.FREE} is free)" in text_of(viz.terminal.pool_map(HAND_MADE[0]))[0]


def test_the_terminals_pool_has_a_letter_for_every_block() -> None:
    shared = step(0, [row(0, 0, 6), row(1, 0, 7)], {0: (3, 7), 1: (3, 1)})
    assert text_of(viz.terminal.pool_map(HAND_MADE[0], columns=4))[1:] == [". B B A ", ". . . A "]
    assert text_of(viz.terminal.pool_map(shared, columns=8))[1] == ". B . * . . . A "


def test_the_terminals_block_table_wraps() -> None:
    lines = text_of(viz.terminal.block_table(range(40, 58), "Table"))
    assert [len(line.split()) for line in lines] == [1, 17, 17, 3, 3]
    assert lines[4].split() == ["physical", "56", "57"]


# Without matplotlib ---------------------------------------------------------------------------------------------------


def test_without_matplotlib_terminals_work_and_notebooks_are_told_what_to_install() -> None:
    script = """
import json, sys
sys.modules["matplotlib"] = None
import pagebrain
from pagebrain import viz
viz.terminal.pool_map, viz.cached_lengths, viz.show_source
messages = []
for name in ("pool_map", "Picture", "staircase"):
    try:
        getattr(viz, name)
    except ImportError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    messages = json.loads(done.stdout)
    assert len(messages) == 3 and all("pip install 'pagebrain[course]'" in message for message in messages)


def test_every_public_name_exists() -> None:
    assert all(getattr(viz, name) for name in viz.__all__)
    assert set(viz.__all__) == set(dir(viz))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        viz.nothing  # noqa: B018


def test_lanes_show_every_step_token_and_note() -> None:
    steps = [(0.0, 0.02, "A"), (0.02, 0.04, "AB")]
    readings = [(0.0, [("+", "A")]), (0.02, [("+", "B")]), (0.04, [("-", "B")])]
    visits = {"A": viz.Visit(0.0, [0.021, 0.041], 0.041), "B": viz.Visit(0.01, [0.041], 0.035)}
    picture = viz.lanes(steps, readings, visits)
    [axes] = picture.figure.axes
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([20, 20])  # type: ignore[attr-defined]
    assert {text.get_text().strip() for text in axes.texts} == {"A", "AB", "+A", "+B", "\N{MINUS SIGN}B"}
    dots = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]  # type: ignore[arg-type]
    assert dots == [pytest.approx([21, 41]), pytest.approx([41])]
    assert "computes 2 steps, with A, AB in them" in picture.alt and "A has 2 tokens and is in 2 steps" in picture.alt


def test_labels_of_lanes_do_not_overlap_where_notes_are_read_one_shortly_after_the_other() -> None:
    minus = "\N{MINUS SIGN}"
    for gap in (0.0005, 0.004, 0.012, 0.03):
        steps = [(0.0, 0.1, "AB"), (0.1, 0.35 - gap, "AB")]
        readings = [(0.0, [("+", "A"), ("+", "B")]), (0.35 - gap, [("-", "B")]), (0.35, [("-", "A")])]
        visits = {"A": viz.Visit(0.0, [0.1], 0.35), "B": viz.Visit(0.0, [0.1], 0.3)}
        figure = viz.lanes(steps, readings, visits).figure
        figure.canvas.draw()
        texts = [text for text in figure.axes[0].texts if text.get_text().startswith(" ")]
        assert "".join(text.get_text() for text in texts).split() == ["+A", "+B", f"{minus}B", f"{minus}A"]
        boxes = [text.get_window_extent() for text in texts]
        assert not any(left.overlaps(right) for left, right in itertools.pairwise(boxes)), f"notes are read {gap} s apart"
        assert all(box.x1 <= figure.bbox.x1 for box in boxes), "a label stands outside the picture"
