"""Task 5.1: takes notes off the lists while walking over them, so every second one is skipped."""


class AsyncEngine:
    def read_notes(self) -> None:
        for client in self.arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
            self.arrived.remove(client)
        for client in self.left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
            self.left.remove(client)
