"""Task 6.5: there are as many splits as programs are wanted, with tiles for them or not."""


def choose_num_splits(num_queries: int, num_tiles: int, num_wanted: int) -> int:
    return -(-num_wanted // num_queries)
