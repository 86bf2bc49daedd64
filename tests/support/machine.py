"""Made-up ``/proc`` and ``/sys/fs/cgroup`` trees, as containers and schedulers make them."""

from collections.abc import Mapping
from pathlib import Path

GB = 1024**3


class Tree:
    """Files below ``root``, which stands for ``/``. The group named last is the one that the process is in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._mounts: dict[str, str] = {}
        self._groups: dict[str, str] = {}

    def write(self, name: str, text: str) -> "Tree":
        """One file."""
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return self

    def v2(self, path: str, files: Mapping[str, object], mount: str = "/sys/fs/cgroup") -> "Tree":
        """A group of cgroup v2."""
        return self._group("", path, files, mount, "/")

    def v1(self, controllers: str, path: str, files: Mapping[str, object], shown: str = "/") -> "Tree":
        """A group of a hierarchy of cgroup v1, whose mount shows the group ``shown`` and what is below."""
        return self._group(controllers, path, files, f"/sys/fs/cgroup/{controllers}", shown)

    def _group(self, controllers: str, path: str, files: Mapping[str, object], mount: str, shown: str) -> "Tree":
        kind = f"cgroup cgroup rw,{controllers}" if controllers else "cgroup2 cgroup2 rw,nsdelegate"
        escaped = mount.replace(" ", "\\040")
        self._mounts[mount] = f"31 23 0:28 {shown} {escaped} rw,nosuid shared:9 - {kind}"
        self._groups[controllers] = f"{len(controllers)}:{controllers}:{path}"
        self.write("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda rw\n" + "\n".join(self._mounts.values()) + "\n")
        self.write("proc/self/cgroup", "\n".join(self._groups.values()) + "\n")
        (self.root / (mount + path).lstrip("/")).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            self.write(f"{mount}{path}/{name}".lstrip("/"), f"{value}\n")
        return self
