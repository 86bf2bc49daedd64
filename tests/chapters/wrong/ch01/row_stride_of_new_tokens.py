"""Task 1.1: the flat index takes the number of new tokens for the length of a row."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        batch_size, num_new = positions.shape
        for b in range(batch_size):
            for t in range(num_new):
                slot = b * num_new + positions[b, t]
                self.keys[layer].flatten(0, 1)[slot] = key[b, t]
                self.values[layer].flatten(0, 1)[slot] = value[b, t]
