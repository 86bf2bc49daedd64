"""Task 7.2: what is left over still names the rows of an earlier step."""


class BatchRows:
    def activate(self, rows: Sequence[int], bucket: int) -> None:
        self.active_rows[: len(rows)] = upload(rows, self.device)
