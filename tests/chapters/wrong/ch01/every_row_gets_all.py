"""Task 1.1: the batch axis is a slice, so that every sequence's row receives the tokens of all sequences."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        self.keys[layer, :, positions] = key
        self.values[layer, :, positions] = value
