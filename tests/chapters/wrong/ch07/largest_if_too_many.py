"""Task 7.2: too many rows get the largest bucket, and some are left out."""


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    return min((bucket for bucket in buckets if bucket >= num_rows), default=max(buckets))
