"""Task 7.2: the rest is filled with the last active row, which is then computed more than once."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        padded = [*rows, *[rows[-1] if rows else self.dummy_row] * (bucket - len(rows))]
        self.active_rows[:bucket].copy_(upload(padded, self.device))
