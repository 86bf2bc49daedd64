"""At least nine in ten mechanical mutants of the solutions are caught by their task's tests; each survivor is explained."""

from pathlib import Path

import pytest

from chapters.course.catalog import Chapter, find_chapters
from tests.chapters.surviving_mutants import SURVIVORS
from tests.support.judging import judge
from tests.support.kernels import kernel_device, require_kernels
from tests.support.mutants import mutants

CHAPTERS = find_chapters()


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_mutants_are_caught(chapter: Chapter, tmp_path: Path) -> None:
    if chapter.number == "06":
        require_kernels(kernel_device())
    found = {tmp_path / f"mutant_{index}.py": mutant for index, mutant in enumerate(mutants(chapter.source))}
    for path, mutant in found.items():
        path.write_text(mutant.source, encoding="utf-8")
    verdicts = judge(tmp_path, {path: (chapter.number, mutant.task) for path, mutant in found.items()})
    survivors = {found[path].name for path, verdict in verdicts.items() if not verdict.failures}
    explained = SURVIVORS.get(chapter.number, {})
    print(f"{chapter.name}: {len(found)} mutants, {len(survivors)} survive: {sorted(survivors)}")
    assert len(found) >= 8
    assert len(survivors) <= len(found) / 10
    assert survivors <= explained.keys(), f"not explained: {sorted(survivors - explained.keys())}"
    assert explained.keys() <= {mutant.name for mutant in found.values()}, "an explanation whose mutant is gone"
