"""Task 7.2: the rest is filled with zeros, and row 0 is somebody's."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        self.active_rows[:bucket].zero_()
        self.active_rows[: len(rows)] = upload(rows, self.device)
