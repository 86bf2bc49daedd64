"""Small random GPT-2 models and what vanilla Hugging Face computes with them."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

POISON = 1e4
"""What unused slots hold: large enough to be seen in any logit, finite so that a weight of zero hides it as it must."""


def random_gpt2(dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> GPT2LMHeadModel:
    """A small GPT-2 with random weights, drawn wide enough that a lost slot moves the logits (initializer_range 0.05).

    Each call gives another model. A copy of one that is there already takes half the time of making it.
    """
    key = (dtype, seed, repr(sorted(settings.items())))
    if key not in _MADE:
        _MADE[key] = _make(dtype, seed, settings)
    return copy.deepcopy(_MADE[key])


_MADE: dict[tuple[torch.dtype, int, str], GPT2LMHeadModel] = {}


def _make(dtype: torch.dtype, seed: int, settings: dict[str, Any]) -> GPT2LMHeadModel:
    defaults: dict[str, Any] = {
        "vocab_size": 97,
        "n_positions": 64,
        "n_embd": 48,
        "n_head": 3,
        "n_layer": 2,
        "initializer_range": 0.05,
        "bos_token_id": 96,
        "eos_token_id": 96,
        "attn_implementation": "eager",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**(defaults | settings)))
        for parameter in model.parameters():  # biases and norms are 0 and 1 when new, which would hide that they are ignored
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype)  # type: ignore[arg-type]
    return model.eval()


@torch.no_grad()
def hf_logits(base: GPT2LMHeadModel, token_ids: list[int]) -> Tensor:
    """Logits ``[num_tokens, vocab_size]`` of one sequence, computed in one piece without a cache."""
    logits: Tensor = base(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits


@torch.no_grad()
def hf_cache(base: GPT2LMHeadModel, token_ids: list[int]) -> dict[str, Tensor]:
    """Hugging Face's own keys and values of a text, each ``[num_tokens, num_layers, num_heads, head_dim]``."""
    layers = base(torch.tensor([token_ids]), use_cache=True).past_key_values.layers
    return {
        "keys": torch.stack([layer.keys[0] for layer in layers]).permute(2, 0, 1, 3),
        "values": torch.stack([layer.values[0] for layer in layers]).permute(2, 0, 1, 3),
    }


@torch.no_grad()
def hf_greedy(base: GPT2LMHeadModel, prompt: list[int], num_tokens: int, eos_token_id: int | None = None) -> list[int]:
    """Greedy tokens by recomputing everything for each; ends after ``eos_token_id`` if one is given."""
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + num_tokens:
        token_ids.append(int(hf_logits(base, token_ids)[-1].argmax()))
        if token_ids[-1] == eos_token_id:
            break
    return token_ids[len(prompt) :]


def poison(pool: Any, value: float = POISON) -> None:
    """Fill all slots of a pool, or of a chapter's cache, with a large finite value: reading an unwritten one shows."""
    for tensor in (*pool.key_pools, *pool.value_pools):
        tensor.fill_(value)
