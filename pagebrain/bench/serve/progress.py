"""The progress bar of ``pagebrain bench serve``: requests that ended, tokens per second so far."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from pagebrain.bench.serve.processes import Progress

Follow = Callable[[str, int, Progress], None]
"""Called with the load's name, how many requests it has, and how far it is."""


@contextlib.contextmanager
def progress_bar(console: Any) -> Iterator[Follow]:
    """A bar on ``console``, and the function that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"))
    with Bar(*columns, TimeElapsedColumn(), TextColumn("{task.fields[speed]}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, speed="")
        last = Progress(0, 0)

        def follow(label: str, total: int, progress: Progress) -> None:
            nonlocal last
            if progress.num_ended < last.num_ended or bar.tasks[0].description != label:
                bar.reset(task, description=label, total=total)
            last = progress
            elapsed_s = bar.tasks[0].elapsed or 0.0
            speed = f"{progress.num_tokens / elapsed_s:,.0f} tokens/s so far" if elapsed_s > 0.5 else ""
            bar.update(task, completed=progress.num_ended, speed=speed)

        yield follow
