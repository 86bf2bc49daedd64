"""Many solutions of the chapters' tasks, judged by the chapters' tests in one other process."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chapters.course.catalog import ROOT
from chapters.course.running import PLUGINS, QUICK

TEST_TIMEOUT_S = 10


@dataclass
class Verdict:
    """What the tests said of one file: how many ran, and the records of those that failed."""

    num_ran: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)


def judge(folder: Path, files: dict[Path, tuple[str, str | None]], *, all_failures: bool = False) -> dict[Path, Verdict]:
    """Judge files, each given with its chapter's number and the task that it is about, ``None`` for all tasks.

    A file's tests stop at its first failure, unless ``all_failures`` are wanted. ``folder`` takes what this needs to write.
    """
    tasks = folder / "tasks.json"
    tasks.write_text(json.dumps({str(path): task for path, (_, task) in files.items()}), encoding="utf-8")
    report = folder / "report.jsonl"
    numbers = sorted({number for number, _ in files.values()})
    [*tests] = (path for number in numbers for path in (ROOT / "tests" / "chapters").glob(f"test_ch{number}_*.py"))
    options = [f"--chapter-file={number}={path}" for path, (number, _) in files.items()]
    options += [] if all_failures else ["--first-failure-only"]
    options += [f"--chapter-report={report}", f"--chapter-timeout={TEST_TIMEOUT_S}", "-p", "tests.support.own_tasks"]
    options += ["--tb=no", "-rN"]  # the report has what is needed; tracebacks of hundreds of failures take long to write
    options += ["-q", "--no-header", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *PLUGINS, *options, *map(str, tests)],
        cwd=ROOT,
        env=os.environ | QUICK | {"PAGEBRAIN_OWN_TASKS": str(tasks), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode in (0, 1), f"pytest itself failed:\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    verdicts = {path: Verdict() for path in files}
    for line in report.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        verdict = verdicts[Path(record["file"])]
        verdict.num_ran += record["outcome"] != "skipped"
        if record["outcome"] == "failed":
            verdict.failures.append(record)
    return verdicts
