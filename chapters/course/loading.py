"""Runs files that are no part of a package: a learner's, or one of many solutions that are judged in one process.

Nothing is cached on disk. Python tells a changed file by its size and a time in whole seconds, which an editor and a grader
can beat; and a learner's folder should hold the learner's files.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType


class FreshLoader(importlib.machinery.SourceFileLoader):
    """Compiles the source at every load."""

    def get_code(self, fullname: str) -> CodeType:
        """The code of the file as it is now."""
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def load_file(path: Path, name: str) -> ModuleType:
    """Run a file as the module ``name``, which stays in ``sys.modules`` unless it fails. Raises what the file raises."""
    loader = FreshLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class OwnChapters(importlib.abc.MetaPathFinder):
    """Makes ``import chapters.ch01_...`` run the learner's file, for the chapters that have one."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = {f"chapters.{stem}": path for stem, path in files.items()}
        self._loaded: dict[str, bytes] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Where a module is, if it is one of these."""
        file = self.files.get(fullname)
        if file is None:
            return None
        self._loaded[fullname] = file.read_bytes()
        return importlib.util.spec_from_file_location(fullname, file, loader=FreshLoader(fullname, str(file)))

    def install(self) -> None:
        """From now on. Chapters that were imported before are forgotten."""
        sys.meta_path.insert(0, self)
        self._forget()

    def uninstall(self) -> None:
        """Forget these chapters, and import what ``chapters/`` holds from now on."""
        sys.meta_path.remove(self)
        self._forget()

    def refresh(self) -> None:
        """Forget all of these chapters if the file of one has changed since it was imported: they import each other."""
        if any(self.files[fullname].read_bytes() != source for fullname, source in self._loaded.items()):
            self._forget()

    def _forget(self) -> None:
        import chapters

        self._loaded.clear()
        for fullname in self.files:
            sys.modules.pop(fullname, None)
            vars(chapters).pop(fullname.rpartition(".")[2], None)
