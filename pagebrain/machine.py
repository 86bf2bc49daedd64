"""How much memory and how many processors this process may use.

A container or a shell may give a process less than the machine has. On Linux, control groups (cgroup v2 and v1; each group
on the path up to the root) and ``ulimit`` set limits, and the smallest one applies. This module is the only place that reads
them. It reads small files and does not import torch.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
UNKNOWN_MEMORY_BYTES = 4 * 2**30
"""Assumed where the system does not say."""


@dataclass(frozen=True)
class MemoryLimit:
    """A limit on the memory of this process.

    Attributes:
        total_bytes: the limit.
        free_bytes: bytes that can still be allocated under it. Cached files count as free.
        name: what sets the limit.
    """

    total_bytes: int
    free_bytes: int
    name: str

    def __str__(self) -> str:
        return f"{self.free_bytes / 1e9:,.2f} GB free of {self.total_bytes / 1e9:,.2f} GB ({self.name})"


def memory_limits(root: Path = ROOT) -> list[MemoryLimit]:
    """All limits on this process's memory: the machine's, its control groups', ``ulimit``'s. ``/proc`` is below ``root``."""
    return [_machine_limit(root), *_group_limits(root), *_process_limits(root)]


def available_memory(root: Path = ROOT) -> MemoryLimit:
    """The limit with the fewest free bytes: this process can allocate no more than these."""
    return min(memory_limits(root), key=lambda limit: limit.free_bytes)


def memory_limit_bytes(root: Path = ROOT) -> int:
    """The smallest of all limits, in bytes."""
    return min(limit.total_bytes for limit in memory_limits(root))


def available_cores(root: Path = ROOT) -> int:
    """Processors that this process may use: those of its affinity mask, and at most its control groups' quota of time.

    A quota of 1.5 processors counts as 2, a quota of 0.25 as 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for group in _groups("cpu", root) if (quota := group.processors()) is not None]
    return max(1, min([cores, *(math.floor(quota + 0.5) for quota in quotas)]))


def allow_many_connections() -> None:
    """Raise the soft limit of open files as far as permitted. Each connection takes one, and the usual limit is 1024."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for soft in (hard, 10_240):  # macOS reports an infinite limit and refuses more than 10,240
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            return


# The machine and the process ------------------------------------------------------------------------------------------


def _machine_limit(root: Path) -> MemoryLimit:
    found = _table(root / "proc/meminfo")  # in KiB
    if "MemTotal" in found:
        total = found["MemTotal"] * 1024
        return MemoryLimit(total, min(total, found.get("MemAvailable", found["MemTotal"]) * 1024), "the machine's memory")
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        total = UNKNOWN_MEMORY_BYTES
    return MemoryLimit(total, total, "the machine's memory")


def _process_limits(root: Path) -> Iterator[MemoryLimit]:
    """Limits on the address space (``ulimit -v``) and on data (``ulimit -d``)."""
    try:
        import resource
    except ImportError:  # Windows
        return
    status = _table(root / "proc/self/status")  # in KiB
    for kind, used, name in ((resource.RLIMIT_AS, "VmSize", "ulimit -v"), (resource.RLIMIT_DATA, "VmData", "ulimit -d")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield MemoryLimit(soft, max(0, soft - status.get(used, 0) * 1024), name)


# Control groups -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """A control group: a folder of files. ``is_v2`` says which files it has."""

    folder: Path
    is_v2: bool

    def memory(self) -> MemoryLimit | None:
        """Its limit, if it has one. ``memory.high`` counts too: the kernel slows a group above it down to a standstill."""
        names = ("memory.max", "memory.high") if self.is_v2 else ("memory.limit_in_bytes",)
        limits = [limit for name in names if (limit := _number(self.folder / name)) is not None]
        if not limits or min(limits) >= 2**60:  # v1 writes "no limit" as the largest number of whole pages
            return None
        used = _number(self.folder / ("memory.current" if self.is_v2 else "memory.usage_in_bytes")) or 0
        stat = _table(self.folder / "memory.stat")
        prefix = "" if self.is_v2 else "total_"
        cached = sum(stat.get(prefix + name, 0) for name in ("active_file", "inactive_file", "slab_reclaimable"))
        free = min(limits) - max(0, used - cached)
        return MemoryLimit(min(limits), max(0, free), "the limit of this container or control group")

    def processors(self) -> float | None:
        """Its quota of processor time, in processors."""
        if self.is_v2:
            quota, _, period = _text(self.folder / "cpu.max").partition(" ")
        else:
            quota, period = _text(self.folder / "cpu.cfs_quota_us"), _text(self.folder / "cpu.cfs_period_us")
        if not quota.isdigit() or not period.isdigit() or int(period) == 0:  # "max", -1, or no such file
            return None
        return int(quota) / int(period)


def _group_limits(root: Path) -> Iterator[MemoryLimit]:
    for group in _groups("memory", root):
        limit = group.memory()
        if limit is not None:
            yield limit


def _groups(controller: str, root: Path) -> Iterator[_Group]:
    """This process's groups that may limit ``controller``, from its own up to the highest visible one.

    Where ``/proc`` names none, the usual mount points are tried: a container's own group is mounted there.
    """
    found = list(_told_groups(controller, root))
    usual = root / "sys/fs/cgroup"
    yield from found or [_Group(usual, True), _Group(usual / controller, False)]


def _told_groups(controller: str, root: Path) -> Iterator[_Group]:
    mounts = list(_mounts(root))
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        is_v2 = controllers == ""
        if not is_v2 and controller not in controllers.split(","):
            continue
        fitting = [mount for mount in mounts if mount.is_v2 == is_v2 and (is_v2 or controller in mount.options)]
        for mount in fitting:
            top = root / mount.point.lstrip("/")
            folder = top / _below(mount.root, path)
            while folder != top:
                yield _Group(folder, is_v2)
                folder = folder.parent
            yield _Group(top, is_v2)


def _below(mount_root: str, path: str) -> str:
    """The path of a group below a mount of ``mount_root``. In a cgroup namespace, the mount's top is the group itself."""
    parts, above = [part for part in path.split("/") if part], [part for part in mount_root.split("/") if part]
    if ".." in parts or parts[: len(above)] != above:
        return ""
    return "/".join(parts[len(above) :])


@dataclass(frozen=True)
class _Mount:
    root: str
    point: str
    is_v2: bool
    options: list[str]


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(" "), (after.split(" ") + ["", "", ""])[:3]
        if len(fields) > 4 and kind in ("cgroup", "cgroup2"):
            yield _Mount(_unescaped(fields[3]), _unescaped(fields[4]), kind == "cgroup2", options.split(","))


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


# Files ----------------------------------------------------------------------------------------------------------------


def _text(file: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return file.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None


def _table(file: Path) -> dict[str, int]:
    """Lines such as ``MemTotal:   24684092 kB`` and ``inactive_file 4096``."""
    words = [line.replace(":", " ").split() for line in _text(file).splitlines()]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
