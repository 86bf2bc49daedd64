"""Task 5.2: a sequence that ends early, with the end-of-text token, gets no ``None``."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for entry in group:
            if not entry.samples:
                continue
            client = self.clients[entry.seq.seq_id]
            client.tokens.put_nowait(entry.seq.token_ids[-1])
            if len(entry.seq.output_token_ids) == client.max_new_tokens:
                client.tokens.put_nowait(None)
                del self.clients[entry.seq.seq_id]
