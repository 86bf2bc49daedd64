"""Task 5.1: ends a sequence that has finished by itself a second time when its client leaves."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                self.engine.finish(client.seq)
        self.arrived.clear()
        self.left.clear()
