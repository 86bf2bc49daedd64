"""Task 6.5: the time for bytes and the time for operations are added."""


def floor_seconds(work: Work, bytes_per_s: float, operations_per_s: float) -> float:
    return work.num_bytes / bytes_per_s + work.num_operations / operations_per_s
