"""What each definition of a chapter is for, and which one it replaces: the table behind ``python -m chapters diff``.

A definition *replaces* another if the table says so: from that chapter on it does the other's work. It is *kept* if a later
chapter imports it. Everything else that a chapter defines is *new*. A test holds the table against the chapters.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """The part of the engine that a definition belongs to, and what it replaces: ``01.generate`` is chapter 01's."""

    role: str
    replaces: tuple[str, ...] = ()


ROLES: dict[str, dict[str, Role]] = {
    "00": {
        "check_prompts": Role("checks"),
        "compute_logits": Role("forward pass"),
        "greedy_token": Role("sampling"),
        "generate_one": Role("loop"),
        "generate": Role("loop"),
    },
    "01": {
        "forward": Role("forward pass", ("00.compute_logits",)),
        "ReservedCache": Role("cache"),
        "masked_attention": Role("attention"),
        "attend_reserved": Role("attention"),
        "prefill_inputs": Role("batch"),
        "decode_inputs": Role("batch"),
        "generate": Role("loop", ("00.generate", "00.generate_one")),
    },
    "02": {
        "BlockManager": Role("cache"),
        "PagedCache": Role("cache", ("01.ReservedCache",)),
        "Rows": Role("batch", ("01.prefill_inputs", "01.decode_inputs")),
        "attend_gathered": Role("attention", ("01.attend_reserved",)),
        "generate": Role("loop", ("01.generate",)),
    },
    "03": {
        "Partial": Role("attention"),
        "add_page": Role("attention"),
        "attend_one": Role("attention"),
        "paged_attention": Role("attention", ("01.masked_attention",)),
        "attend_paged": Role("attention", ("02.attend_gathered",)),
        "generate": Role("loop"),  # around the loop of chapter 02, which it keeps
    },
    "04": {
        "Cache": Role("interfaces"),
        "Retirement": Role("interfaces"),
        "Scheduler": Role("scheduler"),
        "StaticScheduler": Role("scheduler"),
        "FreeAtOnce": Role("cache"),
        "half_the_room": Role("cache"),
        "Engine": Role("loop", ("02.generate",)),
        "generate": Role("loop", ("03.generate",)),
    },
    "05": {
        "EngineFailedError": Role("server"),
        "Client": Role("server"),
        "AsyncEngine": Role("server"),
        "GenerateBody": Role("HTTP"),
        "create_app": Role("HTTP"),
        "event": Role("HTTP"),
        "generate": Role("loop", ("04.generate",)),
        "main": Role("HTTP"),
    },
    "06": {
        "write_kernel": Role("kernels"),
        "attend_tokens": Role("kernels"),
        "decode_kernel": Role("kernels"),
        "merge_kernel": Role("kernels"),
        "Work": Role("roofline"),
        "decode_work": Role("roofline"),
        "floor_seconds": Role("roofline"),
        "choose_num_splits": Role("kernels"),
        "num_wanted_programs": Role("kernels"),
        "write_kv": Role("cache"),
        "paged_decode": Role("attention"),
        "paged_attention": Role("attention", ("03.paged_attention",)),
        "attend_by_kernels": Role("attention", ("03.attend_paged",)),
        "generate": Role("loop"),  # around the loop of chapter 02, as chapter 03's
    },
    "07": {
        "bucket_for": Role("batch"),
        "BatchRows": Role("batch"),
        "decode_step": Role("forward pass"),
        "attend_rows": Role("attention"),
        "InFlight": Role("loop"),
        "Executor": Role("forward pass"),
        "LateRetirement": Role("cache"),
        "Scheduler": Role("scheduler"),
        "Engine": Role("loop"),  # the engine of chapter 04, with steps in flight
        "generate": Role("loop", ("04.generate",)),
    },
}
"""Chapter -> public top-level function or class -> its role."""
