"""Task 7.2: rows are sorted, so that tokens come back in another order than their sequences."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        padded = [*sorted(rows), *[self.dummy_row] * (bucket - len(rows))]
        self.active_rows[:bucket].copy_(upload(padded, self.device))
