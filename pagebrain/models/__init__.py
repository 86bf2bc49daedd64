"""Models whose attention reads a paged cache."""

from pagebrain.models.gpt2 import PagedGPT2LMHeadModel

__all__ = ["PagedGPT2LMHeadModel"]
