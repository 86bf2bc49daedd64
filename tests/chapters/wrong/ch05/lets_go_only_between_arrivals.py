"""Task 5.1: returns early when nobody arrived, so departures wait for the next arrival."""


class AsyncEngine:
    def read_notes(self) -> None:
        if not self.arrived:
            return
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
        self.arrived.clear()
        self.left.clear()
