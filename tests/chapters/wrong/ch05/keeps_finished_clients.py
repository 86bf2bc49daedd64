"""Task 5.2: a finished client stays in ``clients``."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if entry.seq.is_finished:
                client.tokens.put_nowait(None)
