"""Task 7.4: what is in flight is read before the next step is planned: nothing is ever launched ahead."""


class Engine:
    def step(self) -> SequenceGroup | None:
        got = self.read(self.in_flight.popleft()) if self.in_flight else None
        group = self.scheduler.schedule()
        if group is not None:
            self.launch(group)
            if self.depth == 0:
                return self.read(self.in_flight.popleft())
        return got if got is not None or group is None else SequenceGroup(())
