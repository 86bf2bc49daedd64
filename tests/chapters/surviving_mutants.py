"""Mutants that the chapters' tests let pass, and why that is right: chapter -> name of the mutant -> reason."""

SURVIVORS: dict[str, dict[str, str]] = {
    "03": {
        "attend_one: -1 -> 1": "unsqueeze(1) of a total [num_heads] adds the same axis as unsqueeze(-1)",
        "paged_attention: True -> False": "zip's strict only guards against lengths that cannot differ there",
        "paged_attention: lens > page * block_size -> lens >= page * block_size": (
            "the lane reads one page more, all of it masked"
        ),
    },
}
