"""Task 7.3: the dummy's context grows with every step, until it leaves its block."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    everyone = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, everyone))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
