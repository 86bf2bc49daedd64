"""Task 5.1: ends the sequence of a client that left, but the client stays in ``clients``."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.left:
            if client.seq is not None and not client.seq.is_finished:
                self.engine.finish(client.seq)
        self.arrived.clear()
        self.left.clear()
