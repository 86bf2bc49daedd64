"""Overlays replace what they name, add what is new, and leave every other line of the reference as it was."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.overlay import compose, read_overlays

REFERENCE = '''"""A reference."""

import math

LIMIT = 3  # of something


def twice(x: int) -> int:
    """Two times."""
    # BEGIN SOLUTION 1.1
    return 2 * x
    # END SOLUTION


class Box:
    """Holds a number."""

    size = 1

    def __init__(self, x: int) -> None:
        self.x = x  # kept

    @property
    def area(self) -> int:
        # BEGIN SOLUTION 1.2
        return self.x * self.x
        # END SOLUTION

    def root(self) -> float:
        return math.sqrt(self.x)


def last() -> int:
    return twice(LIMIT)
'''


def run(overlay: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "composed"}
    exec(compile(compose(REFERENCE, f'"""Task 1.1: {overlay}'), "composed", "exec"), names)
    return names


def test_a_function_is_replaced_and_all_other_lines_stay() -> None:
    composed = compose(REFERENCE, '"""Task 1.1: adds."""\n\n\ndef twice(x: int) -> int:\n    return x + 2\n    # end\n')
    start, end = REFERENCE.index("def twice"), REFERENCE.index("\n\n\nclass Box")
    assert composed == REFERENCE[:start] + "def twice(x: int) -> int:\n    return x + 2\n    # end" + REFERENCE[end:]


def test_an_overlay_without_statements_changes_nothing() -> None:
    assert compose(REFERENCE, '"""Task 1.1: nothing."""\n') == REFERENCE


def test_a_method_keeps_its_decorators_unless_others_are_given() -> None:
    assert run('x."""\nclass Box:\n    def area(self) -> int:\n        return 7\n')["Box"](3).area == 7
    assert run('x."""\nclass Box:\n    @staticmethod\n    def area() -> int:\n        return 7\n')["Box"](3).area() == 7


def test_a_class_lists_only_what_it_replaces_or_adds() -> None:
    box = run('x."""\nclass Box:\n    size = 2\n    def half(self) -> float:\n        return self.x / 2\n')["Box"](4)
    assert (box.size, box.half(), box.area, box.root()) == (2, 2, 16, 2)


def test_what_is_new_stands_after_the_imports_in_its_own_order() -> None:
    names = run(
        'x."""\nimport operator\nfrom functools import partial\n\nONE = 1\ndouble = partial(operator.mul, ONE * 2)\n\n'
        "def twice(x: int) -> int:\n    return double(x)\n"
    )
    assert names["last"]() == 6
    composed = compose(REFERENCE, '"""Task 1.1: x."""\nimport operator\nONE = operator.index(1)\n')
    assert (
        composed.index("import math") < composed.index("import operator") < composed.index("ONE") < composed.index("LIMIT")
    )


def test_what_needs_the_reference_at_import_stands_after_it() -> None:
    names = run('x."""\nclass Big(Box):\n    size = 9\n\ndef largest(box: Big) -> int:\n    return box.size\n')
    assert names["largest"](names["Big"](1)) == 9


def test_what_uses_the_reference_only_when_called_may_stand_before_it() -> None:
    assert run('x."""\ndef helper() -> int:\n    return twice(4)\n')["helper"]() == 8


def test_an_assignment_replaces_one_of_the_same_name() -> None:
    assert run('x."""\nLIMIT: int = 5\n')["last"]() == 10


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("def twice(x: int) -> int:\n    return x\n", "docstring that begins 'Task N.M: '"),
        ('"""Wrong somehow."""\n', "docstring that begins 'Task N.M: '"),
        ('"""Task 1.1: prints."""\nprint(1)\n', "line 2 of the overlay"),
        ('"""Task 1.1: x."""\nclass Box(dict):\n    size = 2\n', "other bases"),
    ],
)
def test_an_overlay_that_cannot_be_placed_is_refused(overlay: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(REFERENCE, overlay)


def test_a_file_is_read_with_its_task_and_summary(tmp_path: Path) -> None:
    path = tmp_path / "adds.py"
    path.write_text('"""Task 10.2: adds instead.\n\nMore."""\n', encoding="utf-8")
    (overlay,) = read_overlays(path)
    assert (overlay.path, overlay.name, overlay.task, overlay.summary) == (path, "adds", "10.2", "adds instead.")
    path.write_text("LIMIT = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"adds\.py, adds: an overlay needs"):
        read_overlays(path)


def test_a_file_with_headings_is_split_at_them(tmp_path: Path) -> None:
    first, second = '"""Task 1.1: one."""\n\nLIMIT = 1\n', '"""Task 1.2: two."""\n\nLIMIT = 2  # %% here\n'
    path = tmp_path / "ch01.py"
    path.write_text(f'"""Some."""\n\n# %% one\n{first}\n\n# %% two\n{second}', encoding="utf-8")
    found = [(overlay.name, overlay.task, overlay.source) for overlay in read_overlays(path)]
    assert found == [("one", "1.1", first), ("two", "1.2", second)]
    path.write_text(f"# %% one\n{first}\n\n# %% one\n{second}", encoding="utf-8")
    with pytest.raises(ValueError, match="two overlays have the name one"):
        read_overlays(path)
