"""Task 7.2: the first bucket of the list that is large enough, which need not be the smallest."""


def bucket_for(num_rows: int, buckets: Sequence[int]) -> int:
    for bucket in buckets:
        if bucket >= num_rows:
            return bucket
    raise ValueError(f"{num_rows} rows fit into no bucket")
