"""The figures that the pages print are those that were measured."""

import json

import pytest

from tools import write_performance


@pytest.mark.parametrize("page", write_performance.PAGES, ids=lambda page: str(page.relative_to(write_performance.ROOT)))
def test_the_tables_say_what_the_json_says(page: object) -> None:
    text = page.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    assert write_performance.with_tables(text) == text, "run python tools/write_performance.py"


def test_the_performance_page_has_every_figure_of_the_cpu_runs_and_readme_a_row_of_speed() -> None:
    readme, page = (path.read_text(encoding="utf-8") for path in write_performance.PAGES)
    for path in write_performance.RESULTS.glob("cpu-*.json"):
        for result in json.loads(path.read_text(encoding="utf-8"))["engines"].values():
            assert f"{result['output_tokens_per_s']:.0f} (" in page
    rows = [line for line in write_performance.vllm_table().splitlines() if line in readme]
    assert write_performance.vllm_table() in page and 3 <= len(rows) <= 4  # heading and rule among them
