"""Task 7.3: attention is scaled by the head's size, whatever the model says."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.write(layer, slots, key, value)
        keys, values = (pools[layer][tables].flatten(1, 2) for pools in (cache.key_pools, cache.value_pools))
        scale = query.shape[-1] ** -0.5
        return masked_attention(query[:, None], keys, values, positions[:, None], scale)[:, 0]

    everyone = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, everyone))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row :].zero_()
