"""The learner's folder: where their files are, how they are written so that none is ever lost, what the last check said."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from chapters.course.catalog import ROOT, Chapter, open_tasks
from chapters.course.errors import CourseError

VARIABLE = "PAGEBRAIN_WORK"
_PROGRESS = ".progress.json"


def work_folder(given: str | None = None) -> Path:
    """``--work``, else ``$PAGEBRAIN_WORK``, else ``work/`` in the repository."""
    return Path(given or os.environ.get(VARIABLE) or ROOT / "work").absolute()


def own_file(chapter: Chapter, work: Path) -> Path:
    """Where the learner's file of a chapter is, or would be."""
    return work / f"{chapter.name}.py"


def shown(path: Path) -> str:
    """A path for people: from the repository if it is in there."""
    with contextlib.suppress(ValueError):
        return path.relative_to(ROOT).as_posix()
    return str(path)


def write_file(path: Path, text: str) -> None:
    """Write a whole file or nothing: a full disk leaves what was there before."""
    temporary = _write_beside(path, text)
    os.replace(temporary, path)


def start_file(path: Path, text: str, *, force: bool) -> Path | None:
    """Write a learner's file that is not there yet. With ``force``, one that is there is moved to ``old/`` first.

    Returns where the old file is now, if there was one. Raises ``CourseError`` if there is one and ``force`` is not set.
    """
    exists = os.path.lexists(path)
    if exists and not force:
        raise CourseError(f"{shown(path)} is there already and was left as it is (--force keeps it in old/ and starts anew)")
    temporary = _write_beside(path, text)
    kept = None
    try:
        if exists:
            kept = _free_name(path)
            kept.parent.mkdir(exist_ok=True)
            os.rename(path, kept)
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return kept


def _write_beside(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are the owner's alone
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise CourseError(f"could not write {shown(path)}: {error.strerror or error}; nothing was changed") from error
    return Path(name)


def _free_name(path: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = [
        f"{path.stem}_{stamp}{path.suffix}",
        *(f"{path.stem}_{stamp}_{number}{path.suffix}" for number in range(2, 1000)),
    ]
    return next(kept for name in names if not os.path.lexists(kept := path.parent / "old" / name))


@dataclass(frozen=True)
class Snapshot:
    """Which file, and in which state: what a grade is about."""

    path: Path
    source: bytes
    modified: datetime

    @classmethod
    def take(cls, path: Path) -> "Snapshot":
        """Read the file. Raises ``OSError``."""
        return cls(path, path.read_bytes(), datetime.fromtimestamp(path.stat().st_mtime).astimezone())

    @property
    def sha256(self) -> str:
        """The hash of its content."""
        return hashlib.sha256(self.source).hexdigest()

    def __str__(self) -> str:
        return f"{shown(self.path)}, modified {self.modified:%Y-%m-%d %H:%M:%S}, sha256 {self.sha256[:12]}"


def save_progress(
    work: Path, chapter: Chapter, snapshot: Snapshot, passed: Mapping[str, bool], own: Mapping[str, Path]
) -> None:
    """Remember what a check of a file of ``work`` said, together with what was said before about the same content.

    ``own`` are the learner's files that stood for earlier chapters: with others, the same file may do otherwise.
    """
    progress = _read_progress(work)
    before = progress.get(chapter.number, {})
    earlier = {str(path): Snapshot.take(path).sha256 for path in own.values()}
    known = before["tasks"] if before.get("sha256") == snapshot.sha256 and before.get("earlier", {}) == earlier else {}
    progress[chapter.number] = {
        "sha256": snapshot.sha256,
        "earlier": earlier,
        "checked": datetime.now().astimezone().isoformat(timespec="seconds"),
        "tasks": {**known, **passed},
    }
    write_file(work / _PROGRESS, json.dumps(progress, indent=2) + "\n")


def task_states(work: Path, chapter: Chapter) -> dict[str, str]:
    """For each task: ``not started``, ``to do``, ``not checked``, ``passed``, ``failed``."""
    path = own_file(chapter, work)
    if not path.is_file():
        return {task.task_id: "not started" for task in chapter.tasks}
    snapshot = Snapshot.take(path)
    todo = set(open_tasks(snapshot.source.decode("utf-8", errors="replace")))
    last = _read_progress(work).get(chapter.number, {})
    same = last.get("sha256") == snapshot.sha256 and all(
        Path(name).is_file() and Snapshot.take(Path(name)).sha256 == sha256
        for name, sha256 in last.get("earlier", {}).items()
    )
    verdicts = last["tasks"] if same else {}
    states = {True: "passed", False: "failed", None: "not checked"}
    return {task.task_id: "to do" if task.task_id in todo else states[verdicts.get(task.task_id)] for task in chapter.tasks}


def _read_progress(work: Path) -> dict[str, Any]:
    """What is remembered; nothing if the file is missing or not ours."""
    try:
        found = json.loads((work / _PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: entry for key, entry in found.items() if isinstance(entry, dict) and isinstance(entry.get("tasks"), dict)}
