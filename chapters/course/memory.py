"""A limit on the memory that the rest of this process may take."""

from pathlib import Path

GIGABYTE = 1 << 30


def limit_memory(gigabytes: float) -> bool:
    """Let this process take that much more than it has now; then Python raises ``MemoryError``, torch ``RuntimeError``.

    The limit is on address space, of which torch takes several GB when it is imported: import it first. Returns whether
    there is such a limit on this system (Linux has it; macOS and Windows do not).
    """
    try:
        import resource
    except ImportError:  # Windows
        return False
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        limit = pages * resource.getpagesize() + int(gigabytes * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):
        return False
    return True
