"""Task 1.1: all sequences are written at the positions of the first."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        self.keys[layer][:, positions[0]] = key
        self.values[layer][:, positions[0]] = value
