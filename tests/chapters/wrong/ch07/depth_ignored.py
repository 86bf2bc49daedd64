"""Task 7.4: a step is always launched ahead, at depth 0 as well."""


class Engine:
    def step(self) -> SequenceGroup | None:
        group = self.scheduler.schedule()
        if group is not None:
            self.launch(group)
        if self.in_flight and (group is None or len(self.in_flight) > 1):
            return self.read(self.in_flight.popleft())
        return None if group is None else SequenceGroup(())
