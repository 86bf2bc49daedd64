"""Task 7.2: active_rows becomes a new tensor when the batch is padded."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        if len(rows) == bucket:
            self.active_rows[:bucket] = upload(rows, self.device)
        else:
            padding = [self.dummy_row] * (len(self.active_rows) - len(rows))
            self.active_rows = upload([*rows, *padding], self.device)
