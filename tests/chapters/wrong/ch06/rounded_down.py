"""Task 6.5: the division is rounded down: fewer programs than were wanted."""


def choose_num_splits(num_queries: int, num_tiles: int, num_wanted: int) -> int:
    return max(1, min(num_wanted // num_queries, num_tiles))
