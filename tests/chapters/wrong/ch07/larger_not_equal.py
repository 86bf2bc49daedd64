"""Task 7.2: a bucket that is exactly full is passed over."""


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    fitting = [bucket for bucket in buckets if bucket > num_rows]
    if not fitting:
        raise ValueError(f"{num_rows} rows fit into no bucket")
    return min(fitting)
