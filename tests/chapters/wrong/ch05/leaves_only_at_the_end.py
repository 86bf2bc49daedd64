"""Task 5.4: the note that the client left stands after the loop, so a cancelled reader leaves none."""


class AsyncEngine:
    async def stream(self, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[int, None]:
        self.engine.check_request(prompt, max_new_tokens)
        if self.failure is not None:
            raise EngineFailedError("the engine has stopped") from self.failure
        client = Client(prompt, max_new_tokens)
        self.arrived.append(client)
        self.note.set()
        while (token := await client.tokens.get()) is not None:
            if isinstance(token, Exception):
                raise EngineFailedError("a step failed") from token
            yield token
        self.left.append(client)
        self.note.set()
