"""Task 7.4: once two steps are in flight both are read: every second step is waited for."""


class Engine:
    def step(self) -> SequenceGroup | None:
        group = self.scheduler.schedule()
        if group is not None:
            self.launch(group)
        if self.in_flight and (group is None or len(self.in_flight) > self.depth):
            while self.in_flight:
                got = self.read(self.in_flight.popleft())
            return got
        return None if group is None else SequenceGroup(())
