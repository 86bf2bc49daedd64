"""Task 5.1: forgets the client that left, but its sequence goes on in the engine and keeps its blocks."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
        self.arrived.clear()
        self.left.clear()
