"""Task 5.2: keeps all tokens back until the sequence has finished."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if entry.seq.is_finished:
                client = self.clients.pop(entry.seq.seq_id)
                for token_id in entry.seq.output_token_ids:
                    client.tokens.put_nowait(token_id)
                client.tokens.put_nowait(None)
