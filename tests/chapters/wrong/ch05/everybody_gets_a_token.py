"""Task 5.2: gives each client its sequence's last token after every step, also if it was not in that step."""


class AsyncEngine:
    def deliver(self, group: SequenceGroup) -> None:
        for seq_id, client in list(self.clients.items()):
            client.tokens.put_nowait(client.seq.token_ids[-1])
            if client.seq.is_finished:
                client.tokens.put_nowait(None)
                del self.clients[seq_id]
