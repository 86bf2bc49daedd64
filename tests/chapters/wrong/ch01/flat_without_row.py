"""Task 1.1: the flat index forgets where a sequence's own row begins."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        flat = positions.flatten()
        self.keys[layer].flatten(0, 1)[flat] = key.flatten(0, 1)
        self.values[layer].flatten(0, 1)[flat] = value.flatten(0, 1)
