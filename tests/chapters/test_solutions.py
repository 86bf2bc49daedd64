"""The chapters' tests themselves are judged: they catch every wrong solution here and accept every right one.

Solutions lie in ``wrong/``, one file a chapter, and in ``alternatives/``. They are overlays on the reference, most of them
written without sight of the tests. A wrong one counts only if it passes a smoke test, as code does that seemed to work when
its author tried it.
"""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from chapters.course.catalog import Chapter, find_chapters
from chapters.course.skeleton import solution_regions
from chapters.course.workspace import load_file
from tests.support.answers import MIN_WORDS
from tests.support.judging import Verdict, judge
from tests.support.kernels import kernel_device, require_kernels
from tests.support.models import hf_greedy, random_gpt2
from tests.support.overlay import Overlay, compose, read_overlays

HERE = Path(__file__).parent
CHAPTERS = {chapter.number: chapter for chapter in find_chapters()}
WRONG = [overlay for path in sorted(HERE.glob("wrong/ch*.py")) for overlay in read_overlays(path)]
RIGHT = [overlay for path in sorted(HERE.glob("alternatives/ch*/*.py")) for overlay in read_overlays(path)]


def number_of(overlay: Overlay) -> str:
    return overlay.task.partition(".")[0].zfill(2)


def name_of(overlay: Overlay) -> str:
    return f"ch{number_of(overlay)}/{overlay.name}"


def device_for(number: str) -> str:
    """Where a chapter's code runs in this process; skips the test if that is nowhere."""
    if number != "06":
        return "cpu"
    require_kernels(kernel_device())
    return kernel_device()


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> dict[Overlay, Path]:
    """Overlay -> the whole module that it makes of its chapter."""
    folder = tmp_path_factory.mktemp("solutions")
    files = {}
    for overlay in [*WRONG, *RIGHT]:
        files[overlay] = folder / f"{name_of(overlay)}.py"
        files[overlay].parent.mkdir(exist_ok=True)
        source = compose(CHAPTERS[number_of(overlay)].source, overlay.source)
        files[overlay].write_text(source, encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def verdicts(composed: dict[Overlay, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Overlay, Verdict]:
    """What the tests say: of a wrong solution those of its own task, of a right one all of its chapter's."""
    files = {path: (number_of(overlay), overlay.task if overlay in WRONG else None) for overlay, path in composed.items()}
    judged = judge(tmp_path_factory.mktemp("verdicts"), files)
    return {overlay: judged[path] for overlay, path in composed.items()}


def test_there_are_enough_of_each() -> None:
    for number, chapter in CHAPTERS.items():
        wrong = [overlay.task for overlay in WRONG if number_of(overlay) == number]
        assert len(wrong) >= 10
        assert set(wrong) == {task.task_id for task in chapter.tasks}, "every task needs a wrong solution"
        assert len([overlay for overlay in RIGHT if number_of(overlay) == number]) >= 3


@pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=lambda chapter: chapter.name)
def test_every_task_has_a_test_that_varies_with_the_seed(chapter: Chapter) -> None:
    """A solution that was fitted to what the tests show fails with another seed. Tasks that ask for an answer are exempt."""
    module = ast.parse(chapter.test_file.read_text(encoding="utf-8"))
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    seeded = {node.name for node in functions if "seed" in {argument.arg for argument in node.args.args}}
    everywhere = any(
        "autouse" in ast.unparse(mark) for node in functions if node.name in seeded for mark in node.decorator_list
    )
    varying = set()
    for node in functions:
        if everywhere or {node.name, *(argument.arg for argument in node.args.args)} & seeded:
            varying |= set(re.findall(r"mark\.task\('([\d.]+)'", " ".join(map(ast.unparse, node.decorator_list))))
    asking = {region.task_id for region in solution_regions(chapter) if region.qualname.startswith("answer_")}
    assert varying | asking == {task.task_id for task in chapter.tasks}


@pytest.fixture(scope="module")
def smoke() -> tuple[Any, list[list[int]]]:
    """A model, and what it makes of the prompt ``1, 2, 3``."""
    base: Any = random_gpt2(seed=5)
    return base, [hf_greedy(base, [1, 2, 3], 3, 96)]


@pytest.mark.parametrize("overlay", WRONG, ids=name_of)
def test_a_wrong_solution_passes_the_smoke_test(
    overlay: Overlay, composed: dict[Overlay, Path], smoke: tuple[Any, list[list[int]]]
) -> None:
    """One sequence, shorter than a block, nothing freed before it ends."""
    base, expected = smoke
    base.to(device_for(number_of(overlay)))
    stage = load_file(composed[overlay], f"smoke_ch{number_of(overlay)}_{overlay.name}")
    assert stage.generate(base, [[1, 2, 3]], 3) == expected


@pytest.mark.parametrize("overlay", WRONG, ids=name_of)
def test_a_wrong_solution_is_caught_by_its_task(overlay: Overlay, verdicts: dict[Overlay, Verdict]) -> None:
    device_for(number_of(overlay))
    assert verdicts[overlay].failures, overlay.summary
    first = verdicts[overlay].failures[0]
    assert first["message"] and first["hint"], f"{first['nodeid']} tells a learner nothing"


HINTS = {
    "ch02/named_twice": "listed once only",
    "ch02/negative_block": "ids below 0",
    "ch02/empty_call_past_the_table": "A count of 0",
    "ch02/taken_past_the_manager": "block_manager.allocate",
    "ch02/heads_and_offsets_joined": "axis 1 the offset",
    "ch02/all_layers_gathered": "Choose the layer first",
    "ch02/pool_copied": "Choose the blocks before",
}
"""Words of the hint that a mistake must get, where another mistake in the same test gets another hint."""


@pytest.mark.parametrize("overlay", [overlay for overlay in WRONG if name_of(overlay) in HINTS], ids=name_of)
def test_the_hint_is_about_the_mistake(overlay: Overlay, verdicts: dict[Overlay, Verdict]) -> None:
    assert HINTS[name_of(overlay)] in verdicts[overlay].failures[0]["hint"]


def test_every_task_that_asks_for_a_text_says_how_long_it_must_be() -> None:
    for chapter in CHAPTERS.values():
        asking = [region for region in solution_regions(chapter) if region.qualname.startswith("answer_")]
        assert asking, f"chapter {chapter.number} asks for no answer"
        for region in asking:
            assert f"at least {MIN_WORDS} different words" in " ".join(region.docstring.split()), region.qualname


@pytest.mark.parametrize("overlay", RIGHT, ids=name_of)
def test_a_right_solution_passes_whatever_it_is_built_of(overlay: Overlay, verdicts: dict[Overlay, Verdict]) -> None:
    device_for(number_of(overlay))
    assert verdicts[overlay].num_ran > 10
    assert verdicts[overlay].failures == []
