"""Task 5.1: takes all notes out of the lists first, so whoever is not reached is forgotten."""


class AsyncEngine:
    def read_notes(self) -> None:
        arrived, self.arrived = self.arrived, []
        left, self.left = self.left, []
        for client in arrived:
            client.seq = self.engine.add_request(client.prompt, client.max_new_tokens)
            self.clients[client.seq.seq_id] = client
        for client in left:
            if client.seq is not None:
                self.clients.pop(client.seq.seq_id, None)
                if not client.seq.is_finished:
                    self.engine.finish(client.seq)
