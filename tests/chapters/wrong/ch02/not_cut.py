"""Task 2.4: all slots of the pages are returned, empty ones too, which the mask of attention happens to hide."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        table = list(self.block_table(seq_id))
        return self.key_pools[layer, table].flatten(0, 1), self.value_pools[layer, table].flatten(0, 1)
