"""What a process may use of the machine: limits read from made-up ``/proc`` and ``/sys`` trees, and a real ``ulimit``."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pagebrain import machine
from pagebrain.devices import limit_threads
from pagebrain.machine import available_cores, available_memory, memory_limit_bytes
from tests.support.machine import GB, Tree

UNLIMITED_V1 = 9223372036854771712


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A machine of 32 GB, 30 of them free, with 16 processors and without control groups."""
    return Tree(tmp_path).write("proc/meminfo", f"MemTotal: {32 * GB // 1024} kB\nMemAvailable: {30 * GB // 1024} kB\n")


def test_without_control_groups_the_machine_is_the_limit(tree: Tree) -> None:
    assert (available_memory(tree.root).free_bytes, memory_limit_bytes(tree.root)) == (30 * GB, 32 * GB)
    assert available_memory(tree.root).name == "the machine's memory"


def test_what_a_v2_group_uses_already_is_not_free_but_cached_files_are(tree: Tree) -> None:
    tree.v2("/app", {"memory.max": 2 * GB, "memory.current": GB, "memory.stat": f"anon 1\ninactive_file {GB // 4}"})
    found = available_memory(tree.root)
    assert (found.total_bytes, found.free_bytes) == (2 * GB, 2 * GB - GB + GB // 4)
    assert (
        str(found)
        == f"{1.25 * GB / 1e9:.2f} GB free of {2 * GB / 1e9:.2f} GB (the limit of this container or control group)"
    )


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (["max", 3 * GB, "max"], 3 * GB),
        ([2 * GB, 3 * GB, "max"], 2 * GB),
        (["max", 3 * GB, GB], GB),
        (["max", "max", "max"], 32 * GB),
        ([None, None, None], 32 * GB),
        ([64 * GB, "max", "max"], 32 * GB),
    ],
)
def test_the_smallest_limit_on_the_path_to_the_root_holds_in_v2(
    tree: Tree, limits: list[int | str | None], expected: int
) -> None:
    for path, limit in zip(("/", "/a.slice", "/a.slice/b.scope"), limits):
        tree.v2(path, {} if limit is None else {"memory.max": limit, "memory.current": 0})
    assert memory_limit_bytes(tree.root) == expected


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ([UNLIMITED_V1, 3 * GB, UNLIMITED_V1], 3 * GB),
        ([UNLIMITED_V1, 3 * GB, GB], GB),
        ([UNLIMITED_V1, UNLIMITED_V1, UNLIMITED_V1], 32 * GB),
    ],
)
def test_the_smallest_limit_on_the_path_to_the_root_holds_in_v1(tree: Tree, limits: list[int], expected: int) -> None:
    for path, limit in zip(("/", "/docker", "/docker/1f"), limits):
        stat = f"inactive_file 1\ntotal_inactive_file {GB // 4}\n"
        tree.v1("memory", path, {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": GB // 2, "memory.stat": stat})
    assert memory_limit_bytes(tree.root) == expected
    assert available_memory(tree.root).free_bytes == (expected - GB // 4 if expected < 32 * GB else 30 * GB)


def test_the_limit_that_leaves_least_free_is_named(tree: Tree) -> None:
    tree.v2("/a", {"memory.max": 4 * GB, "memory.current": 3 * GB}).v2("/a/b", {"memory.max": 2 * GB, "memory.current": 0})
    assert (available_memory(tree.root).total_bytes, memory_limit_bytes(tree.root)) == (4 * GB, 2 * GB)


def test_memory_high_counts_too(tree: Tree) -> None:
    tree.v2("/a", {"memory.max": 4 * GB, "memory.high": 3 * GB, "memory.current": 0})
    assert memory_limit_bytes(tree.root) == 3 * GB


@pytest.mark.parametrize("path", ["/", "/../elsewhere", "/not/shown/here"])
def test_in_a_namespace_the_mount_is_the_group(tree: Tree, path: str) -> None:
    tree.v2("/", {"memory.max": GB, "memory.current": 0, "cpu.max": "200000 100000"})
    tree.write("proc/self/cgroup", f"0::{path}\n")
    assert memory_limit_bytes(tree.root) == GB and available_cores(tree.root) <= 2


def test_a_mount_may_show_a_group_that_is_not_the_root(tree: Tree) -> None:
    """As docker does with v1: ``/proc/self/cgroup`` names the group on the host, and the mount begins there."""
    tree.v1("memory", "/", {"memory.limit_in_bytes": GB, "memory.usage_in_bytes": 0}, shown="/docker/1f")
    tree.write("proc/self/cgroup", "4:memory:/docker/1f\n0::/docker/1f\n")
    assert memory_limit_bytes(tree.root) == GB


def test_a_mount_point_may_have_a_space(tree: Tree) -> None:
    tree.v2("/a", {"memory.max": GB, "memory.current": 0}, mount="/sys/fs/c group")
    assert memory_limit_bytes(tree.root) == GB


def test_v1_and_v2_side_by_side(tree: Tree) -> None:
    tree.v2("/", {}, mount="/sys/fs/cgroup/unified")
    tree.v1("memory", "/a", {"memory.limit_in_bytes": GB, "memory.usage_in_bytes": 0})
    tree.v1("cpu,cpuacct", "/b", {"cpu.cfs_quota_us": 100000, "cpu.cfs_period_us": 100000})
    assert memory_limit_bytes(tree.root) == GB and available_cores(tree.root) == 1


@pytest.mark.parametrize("is_v2", [True, False])
def test_without_proc_the_usual_places_are_tried(tmp_path: Path, is_v2: bool) -> None:
    name = "sys/fs/cgroup/memory.max" if is_v2 else "sys/fs/cgroup/memory/memory.limit_in_bytes"
    assert memory_limit_bytes(Tree(tmp_path).write(name, str(2**26)).root) == 2**26


@pytest.mark.parametrize("text", ["", "nonsense", "0::/a\n1:\n\n::\n"])
def test_files_that_make_no_sense_limit_nothing(tree: Tree, text: str) -> None:
    tree.write("proc/self/cgroup", text).write("proc/self/mountinfo", text)
    assert memory_limit_bytes(tree.root) == 32 * GB and available_cores(tree.root) >= 1


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 16), ("200000 100000", 2), ("150000 100000", 2), ("120000 100000", 1), ("20000 100000", 1), ("5", 16)],
)
def test_a_v2_quota_of_time_limits_the_processors(
    tree: Tree, quota: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    tree.v2("/a", {"cpu.max": "800000 100000"}).v2("/a/b", {"cpu.max": quota})
    assert available_cores(tree.root) == min(cores, 8)


@pytest.mark.parametrize(("quota", "cores"), [(-1, 3), (200000, 2), (50000, 1), (400000, 3)])
def test_a_v1_quota_of_time_and_the_affinity_limit_the_processors(
    tree: Tree, quota: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 6})
    tree.v1("cpu,cpuacct", "/a", {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": 100000})
    assert available_cores(tree.root) == cores


def test_ulimit_v_is_a_limit() -> None:
    code = (
        "import resource\n"
        "from pagebrain.machine import available_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "found = available_memory()\n"
        "print(found.name, found.total_bytes == 2**30, 2**29 < found.free_bytes < 2**30)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "ulimit -v True True\n"
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY  # of this process


def test_torch_computes_with_no_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr("pagebrain.devices.available_cores", lambda: 2)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert limit_threads() == 3  # the user's choice
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert limit_threads() == torch.get_num_threads() == 2
        monkeypatch.setattr("pagebrain.devices.available_cores", lambda: 8)
        assert limit_threads() == 2  # more were not asked for
    finally:
        torch.set_num_threads(before)


def test_this_machine_has_limits_that_make_sense() -> None:
    for limit in machine.memory_limits():
        assert 0 <= limit.free_bytes <= limit.total_bytes and limit.total_bytes > 0
