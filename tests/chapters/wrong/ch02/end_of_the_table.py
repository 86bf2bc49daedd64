"""Task 2.4: the unfilled page is taken from the table's end, wrong when the table covers more than is asked for."""


class PagedCache:
    def gather(self, layer: int, seq_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        table = self.block_table(seq_id)
        num_full, rest = divmod(num_tokens, self.block_size)
        keys = [self.key_pools[layer, block_id] for block_id in table[:num_full]]
        values = [self.value_pools[layer, block_id] for block_id in table[:num_full]]
        if rest > 0:
            keys.append(self.key_pools[layer, table[-1], :rest])
            values.append(self.value_pools[layer, table[-1], :rest])
        return torch.cat(keys), torch.cat(values)
