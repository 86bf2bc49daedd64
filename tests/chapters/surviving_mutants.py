"""Mutants that the chapters' tests let pass, and why that is right: chapter -> name of the mutant -> reason."""

SURVIVORS: dict[str, dict[str, str]] = {
    "03": {
        "attend_one: -1 -> 1": "unsqueeze(1) of a total [num_heads] adds the same axis as unsqueeze(-1)",
        "paged_attention: True -> False": "zip's strict only guards against lengths that cannot differ there",
        "paged_attention: lens > page * block_size -> lens >= page * block_size": (
            "the lane reads one page more, all of it masked"
        ),
    },
    "06": {
        "attend_tokens: 0 -> -1 (4)": "a tile with one axis has it at 0 and at -1",
        "attend_tokens: 0 -> -1 (6)": "a tile with one axis has it at 0 and at -1",
        "attend_tokens: 0 -> -1 (7)": "what stands for a block id that is not loaded is never used",
        "attend_tokens: 0 -> 1 (7)": "what stands for a block id that is not loaded is never used",
        "merge_kernel: 0 -> -1 (4)": "a tile with one axis has it at 0 and at -1",
        "merge_kernel: 0 -> -1 (5)": "a tile with one axis has it at 0 and at -1",
    },
    "07": {
        "bucket_for: raise ValueError(f'{num_rows ... e buckets {list(buckets)}') -> pass": (
            "min of an empty list raises ValueError too, with less to say"
        ),
        "BatchRows.release: del self.num_sent[seq_id] -> pass": "update starts the count of a new row at 0",
        "decode_step: 0 -> -1": "of a tensor [bucket, 1] the first column is the last",
        "decode_step: -1 -> 1": "of a tensor [bucket, vocab_size] dimension 1 is the last",
    },
}
