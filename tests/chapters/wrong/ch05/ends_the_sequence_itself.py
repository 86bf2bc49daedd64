"""Task 5.4: ends its sequence in the engine at once, also while a step is under way."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        try:
            while (token := await client.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise EngineFailedError("a step failed") from token
                yield token
        finally:
            if client.seq is None:
                self.arrived.remove(client)
            elif not client.seq.is_finished:
                del self.clients[client.seq.seq_id]
                self.engine.finish(client.seq)
            self.note.set()
