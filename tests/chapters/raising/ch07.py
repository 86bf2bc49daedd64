"""Wrong solutions of chapter 07 that raise at once, so no author took them for right. ``# %%`` names each."""

# %% a_number_written_by_index
"""Task 7.3: the dummy's context is set by an index, which copies the number 0 from the host."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active], rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    all_rows = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, all_rows))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 1
    rows.context_lens[rows.dummy_row] = 0


# %% position_one_too_low
"""Task 7.3: the position is taken to be one less than the context length."""


@torch.no_grad()
def decode_step(model: GPT2LMHeadModel, cache: PagedCache, rows: BatchRows, logits: Tensor, sampled: Tensor) -> None:
    active = rows.active_rows[: len(sampled)]
    positions, tables = rows.context_lens[active] - 1, rows.block_tables[active]
    blocks = tables.gather(1, positions[:, None] // cache.block_size)[:, 0]
    slots = blocks * cache.block_size + positions % cache.block_size
    attend = attend_rows(model, cache, tables, slots, positions)
    all_rows = torch.arange(len(sampled), device=rows.device)
    logits.copy_(forward(model, rows.token_ids[active], positions, attend, all_rows))
    sampled.copy_(logits.argmax(dim=-1))
    rows.token_ids[active] = sampled
    rows.context_lens[active] = positions + 2
    rows.context_lens[rows.dummy_row :].zero_()
