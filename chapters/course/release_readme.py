"""The README of a folder for students."""

from collections.abc import Sequence

from chapters.course.catalog import Chapter

_TEXT = """\
# PageBrain: your part

You build a serving engine for GPT-2, a chapter at a time. These chapters are yours to write:

{table}

{before}

## Set up

```
make lab
```

makes an environment in `.venv` (once; a few minutes) and opens the notebooks. Without `make`, on Windows say:

```
python -m venv .venv
.venv\\Scripts\\python -m pip install -r requirements.txt
.venv\\Scripts\\python -m pip install --no-deps -e .
```

The commands below are for `.venv/bin/python`; `source .venv/bin/activate` makes it plain `python`.

## Work

1. Read `{notebook}` as it is: its outputs are stored in it. Its cells run on your file, and stop where that is not done.
2. Open `work/{name}.py`. Each task ends in a `TodoError`; put your code in its place. Leave the imports as they are: a file
   that imports more from `pagebrain` or `chapters` is not graded.
3. Check one task, then all of them:

   ```
   python -m chapters check {task}
   python -m chapters check {number}
   ```

   A failure says what was got, what was expected and where, and gives a hint. `-v` shows everything that pytest says.
4. See it at work: `python -m chapters try {number}` puts your part into the real engine where there is a place for it (a
   block manager, attention, a scheduler), and runs your `generate` otherwise.

`python -m chapters list` shows where you stand. `python -m chapters start {number} --force` begins a chapter again and keeps
your file in `work/old/`. Where an earlier chapter is also yours to write, your own file of it is used.
To bring files along from an earlier folder, and leave the new ones as they are: `cp -pn ../earlier/work/*.py work/`.

Hand in the files in `work/`. They are graded by the tests in `tests/chapters`, with other random numbers than yours.
"""


_BEFORE = "The chapters before them are complete in `chapters/`, to read and to build on."


def student_readme(released: Sequence[Chapter]) -> str:
    """What students read first."""
    first = released[0]
    lines = ["| chapter | your file | points | time |", "|---|---|---|---|"]
    lines += [f"| {c.number}: {c.title} | `work/{c.name}.py` | {c.points} | {c.effort} |" for c in released]
    return _TEXT.format(
        table="\n".join(lines),
        before="" if first.number == "00" else _BEFORE,
        notebook=first.notebook,
        name=first.name,
        task=first.tasks[0].task_id if first.tasks else first.number,
        number=first.number,
    )
