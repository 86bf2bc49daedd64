"""Task 1.1: K and V are added to what a slot held, which is right only for a slot that is still zero."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        rows = torch.arange(len(positions)).unsqueeze(1).expand_as(positions)
        self.keys[layer].index_put_((rows, positions), key, accumulate=True)
        self.values[layer].index_put_((rows, positions), value, accumulate=True)
