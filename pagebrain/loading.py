"""Models and tokenizers: found, read, or refused in one clear line.

Weights come through Hugging Face's ``from_pretrained``, from a folder or the hub. ``load_format="dummy"`` draws random ones
for a known GPT-2 size or a folder's config, without a network, for benchmarks and tests.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from pagebrain.assets import BUNDLED_MODEL
from pagebrain.config import PageBrainConfig
from pagebrain.devices import limit_threads
from pagebrain.errors import ModelLoadError

GPT2_SIZES = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
"""(n_embd, n_layer, n_head) of the published sizes (Radford et al., 2019); all have 1024 positions and 50,257 tokens."""

_MODEL_HINT = "name a folder made with save_pretrained, a hub model (openai-community/gpt2), or none for the bundled model"
_MAX_REASON_CHARACTERS = 240

Loaded = TypeVar("Loaded")


def resolve_device_and_dtype(config: PageBrainConfig) -> PageBrainConfig:
    """``config`` with ``auto`` replaced: a GPU if there is one, float32 on a CPU, bfloat16 on a GPU."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return dataclasses.replace(config, device=device, dtype=dtype)


def load_model(config: PageBrainConfig) -> GPT2LMHeadModel:
    """The Hugging Face model that ``config`` names, in its dtype and on its device, in eval mode.

    Raises ``ModelLoadError`` if there is none, it cannot be read whole, or it is not a GPT-2.
    """
    limit_threads()
    config = resolve_device_and_dtype(config)
    name = _model_name(config)
    if config.load_format == "dummy":
        model = _dummy_model(name, config.seed, config.device)
    else:
        model = _saved_model(name, config.torch_dtype)
    return model.to(config.device, config.torch_dtype).eval()  # type: ignore[arg-type, no-any-return]


def load_tokenizer(config: PageBrainConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that ``config`` names, the model's own by default; ``None`` for a dummy model without one.

    Raises ``ModelLoadError`` if the folder or hub entry has none.
    """
    if config.tokenizer is None and config.load_format == "dummy" and not _has_tokenizer_files(_model_name(config)):
        return None
    if config.tokenizer is None:
        name = _model_name(config)
        if config.load_format != "dummy":
            _check_model(name)  # if there is none, that is what is wrong, and not that it has no tokenizer
    else:
        name = os.path.expanduser(config.tokenizer)
        _check_folder_exists(name, "tokenizer")
    hint = "name another as the tokenizer, or save the model's own beside it"
    if Path(name).is_dir() and not _has_tokenizer_files(name):
        raise ModelLoadError(
            f"the folder {name} holds no tokenizer (no tokenizer.json, no vocab.json with merges.txt): {hint}"
        )
    return _attempt(f"the tokenizer of {name!r}", hint, lambda: AutoTokenizer.from_pretrained(name))


def _model_name(config: PageBrainConfig) -> str:
    return str(BUNDLED_MODEL) if config.model is None else os.path.expanduser(config.model)


def _check_model(name: str) -> None:
    _check_folder_exists(name, "model")
    _read_config(name, _MODEL_HINT)


def _saved_model(name: str, dtype: torch.dtype) -> GPT2LMHeadModel:
    _check_model(name)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}
    loaded: Any = _attempt(f"the weights of {name!r}", _MODEL_HINT, lambda: GPT2LMHeadModel.from_pretrained(name, **options))
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            found = sorted(map(str, info[problem]))
            raise ModelLoadError(
                f"the weights of {name!r} do not fit its config: {problem} {found[:3]} ({len(found)} in all)"
            )
    return model  # type: ignore[no-any-return]


def _read_config(name: str, hint: str) -> GPT2Config:
    hf_config = _attempt(f"the config of {name!r}", hint, lambda: AutoConfig.from_pretrained(name))
    if not isinstance(hf_config, GPT2Config):
        raise ModelLoadError(f"{name!r} is a {hf_config.model_type} model, and PageBrain serves GPT-2 only: {hint}")
    return hf_config


def _dummy_model(name: str, seed: int, device: str) -> GPT2LMHeadModel:
    folder, size = Path(name), name.removeprefix("openai-community/")
    if (folder / "config.json").is_file():
        hf_config = _read_config(name, "name a folder with a GPT-2's config.json")
    elif size in GPT2_SIZES:
        n_embd, n_layer, n_head = GPT2_SIZES[size]
        hf_config = GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head)
    else:
        raise ModelLoadError(f"load_format dummy knows {', '.join(GPT2_SIZES)} and folders with a config.json, got {name!r}")
    hf_config._attn_implementation = "eager"
    where = torch.device(device)  # a GPU draws them in a tenth of a second; they are other ones than a CPU's
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []), where:
        torch.manual_seed(seed % 2**63)
        return GPT2LMHeadModel(hf_config)


def _has_tokenizer_files(name: str) -> bool:
    folder = Path(name)
    return (folder / "tokenizer.json").is_file() or ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file())


def _check_folder_exists(name: str, kind: str) -> None:
    """A name that can only be a path gets an answer about paths, not about the hub."""
    looks_like_path = name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or os.path.isabs(name)
    if looks_like_path and not Path(name).is_dir():
        own = "the bundled model" if kind == "model" else "the model's own"
        raise ModelLoadError(f"there is no {kind} folder {name}: check the path, or leave it out for {own}")


def _attempt(what: str, hint: str, load: Callable[[], Loaded]) -> Loaded:
    """Run a loader of Hugging Face's; whatever it raises becomes one line, of which advice for their users is left out."""
    try:
        return load()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > _MAX_REASON_CHARACTERS:  # what happened stands in the first line
            reason = " ".join(str(error).strip().partition("\n")[0].split()).rstrip(".")
        if len(reason) > _MAX_REASON_CHARACTERS:
            reason = reason[:_MAX_REASON_CHARACTERS] + " ..."
        raise ModelLoadError(f"{what} could not be read: {reason}; {hint}") from error
