"""Loads models and tokenizers, or refuses them with a one-line error.

Hugging Face's ``from_pretrained`` reads weights from a folder or the hub. ``load_format="dummy"`` draws random ones for a
known GPT-2 size or a folder's config, without a network, for benchmarks and tests. (For the engine's own model,
:mod:`pagebrain.models.checkpoints` reads safetensors files without Hugging Face, after the same checks.)
"""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from pagebrain.assets import BUNDLED_MODEL
from pagebrain.config import PageBrainConfig
from pagebrain.devices import limit_threads
from pagebrain.engine.detokenizer import Detokenizer
from pagebrain.errors import ModelLoadError, UnsupportedTokenizerError
from pagebrain.generation_config import read_settings
from pagebrain.layers.activations import find_activation
from pagebrain.model_config import READERS
from pagebrain.models.folder import (
    MODEL_HINT,
    check_has_config,
    check_has_weights,
    check_is_folder,
    check_tokenizer_files,
    has_tokenizer,
    has_vocabulary,
    names_own_code,
    read_json,
)

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

GPT2_SIZES = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
"""(n_embd, n_layer, n_head) of the published sizes (Radford et al., 2019); all have 1024 positions and 50,257 tokens."""

_MAX_REASON_CHARACTERS = 240

Loaded = TypeVar("Loaded")


def load_model(config: PageBrainConfig, notices: list[str] | None = None) -> "GPT2LMHeadModel":
    """The Hugging Face model that ``config`` names, in its dtype and on its device, in eval mode.

    ``notices`` gets a line for each part of the checkpoint that is left out. Code in the checkpoint is never run.

    Raises ``ModelLoadError`` if there is no such model, it is incomplete, or it is not a GPT-2.
    """
    limit_threads()
    config = config.with_device_and_dtype()
    if config.load_format == "dummy":
        model: Any = _dummy_model(config)
        return model.to(config.device, config.torch_dtype).eval()  # type: ignore[no-any-return]
    notices = [] if notices is None else notices
    return load_weights_of(find_model(config, notices), config, notices)


def load_tokenizer(config: PageBrainConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that ``config`` names, the model's own by default; ``None`` for a dummy model without one.

    Raises ``ModelLoadError`` if the folder or hub entry has none, and its subclass ``UnsupportedTokenizerError`` if Hugging
    Face's library cannot load the one in the model's folder.
    """
    name = _model_name(config) if config.tokenizer is None else os.path.expanduser(config.tokenizer)
    hint = "name another as the tokenizer, or save the model's own beside it"
    options: dict[str, Any] = {"trust_remote_code": False}
    if config.tokenizer is None:
        if config.load_format == "dummy" and not has_tokenizer(name):
            return None
        options["config"] = read_config(config)  # if there is no model, the error should name the model
    else:
        check_is_folder(name, "tokenizer")
    is_folder = os.path.isdir(name)
    none_there = ModelLoadError(
        f"the folder {name} holds no tokenizer (no tokenizer.json, no vocab.json with merges.txt): {hint}"
    )
    if is_folder and not has_tokenizer(name):
        raise none_there
    check_tokenizer_files(name)
    try:
        tokenizer: PreTrainedTokenizerBase = _attempt(
            f"the tokenizer of {name!r}", hint, lambda: AutoTokenizer.from_pretrained(name, **options)
        )
    except ModelLoadError as error:  # its files are valid, but it needs a library or code that is missing
        if is_folder and not has_vocabulary(name) and not names_own_code(name):
            raise none_there from error
        if is_folder and config.tokenizer is None:
            raise UnsupportedTokenizerError(str(error)) from error
        raise
    if is_folder and tokenizer.vocab_size == 0:  # Hugging Face makes an empty tokenizer if files are missing
        if config.load_format == "dummy" and config.tokenizer is None:
            return None
        raise none_there
    return tokenizer


def load_text(
    config: PageBrainConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedTokenizerBase | None, Detokenizer | None, str | None]:
    """``tokenizer``, or the one that ``config`` names; its detokenizer; and the reason if the model's own is not supported.

    Raises what :func:`load_tokenizer` raises, except ``UnsupportedTokenizerError``: then token ids are served without text.
    """
    try:
        tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
        return tokenizer, None if tokenizer is None else Detokenizer(tokenizer), None
    except UnsupportedTokenizerError as error:
        return None, None, f"text is off, and token ids are served: {error}"


def read_config(config: PageBrainConfig) -> GPT2Config:
    """Hugging Face's config of the model that ``config`` names; no weights are read.

    Raises ``ModelLoadError`` if there is no such model or it is not a GPT-2.
    """
    name = _model_name(config)
    size = name.removeprefix("openai-community/")
    if config.load_format == "dummy" and not Path(name, "config.json").is_file():
        if size not in GPT2_SIZES:
            known = ", ".join(GPT2_SIZES)
            raise ModelLoadError(f"load_format dummy knows {known} and folders with a config.json, got {name!r}")
        n_embd, n_layer, n_head = GPT2_SIZES[size]
        return GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head)
    return _read_config(name)[0]


def _model_name(config: PageBrainConfig) -> str:
    return str(BUNDLED_MODEL) if config.model is None else os.path.expanduser(config.model)


@dataclass(frozen=True)
class FoundModel:
    """A saved model whose files were checked and whose configs were read, but not its weights.

    Attributes:
        name: a folder, or a hub model.
        config: Hugging Face's.
        generation_config: Hugging Face's, made from ``generation_config.json`` and ``config.json``.
    """

    name: str
    config: GPT2Config
    generation_config: GenerationConfig


def find_model(config: PageBrainConfig, notices: list[str]) -> FoundModel:
    """The saved model that ``config`` names. ``notices`` gets a line for each part that is left out.

    Raises ``ModelLoadError`` if there is no such model, its files are incomplete, or it is not a GPT-2.
    """
    name = _model_name(config)
    hf_config, saved = _read_config(name)
    if not saved.get("transformers_weights"):  # this setting names another file of weights
        check_has_weights(name)
    if "auto_map" in saved or names_own_code(name):
        notices.append(f"{name!r} names code of its own (auto_map), which is never run: Hugging Face's own classes are used")
    classes = saved.get("architectures")
    if hf_config.model_type == "gpt2" and isinstance(classes, list) and not any("GPT2" in str(item) for item in classes):
        notices.append(f"{name!r} names the architectures {classes} and is served as GPT-2, its model_type")
    return FoundModel(name, hf_config, _generation_settings(name, saved, notices))


def load_weights_of(found: FoundModel, config: PageBrainConfig, notices: list[str]) -> "GPT2LMHeadModel":
    """A saved model with its weights, read by Hugging Face, in the dtype and on the device of ``config``, in eval mode.

    ``notices`` gets a line if there are more tensors. Raises ``ModelLoadError`` if one is missing or has a wrong shape.
    """
    name = found.name
    _check_read_by_hugging_face(name, found.config)
    options: dict[str, Any] = {
        "config": found.config,
        "generation_config": found.generation_config,
        "dtype": config.torch_dtype,
        "attn_implementation": "eager",
        "ignore_mismatched_sizes": True,  # they are refused below, with their names and sizes
        "output_loading_info": True,
        "trust_remote_code": False,
    }
    from transformers import GPT2LMHeadModel  # takes a second: it is not needed where safetensors fit

    loaded: Any = _attempt(f"the weights of {name!r}", MODEL_HINT, lambda: GPT2LMHeadModel.from_pretrained(name, **options))
    model, info = loaded
    _check_all_fit(name, info)
    left_out = sorted(info.get("unexpected_keys") or ())
    if left_out:
        notices.append(
            f"tensors of {name!r} that its config does not name are left out: {_first(left_out)} ({len(left_out)} in all)"
        )
    return model.to(config.device, config.torch_dtype).eval()  # type: ignore[no-any-return]


def _check_read_by_hugging_face(name: str, hf_config: GPT2Config) -> None:
    if hf_config.model_type != "gpt2":
        raise ModelLoadError(
            f"{name!r} is a {hf_config.model_type} model, whose weights are read from safetensors files that hold exactly "
            "its tensors, and there are none here: save them so"
        )


def _generation_settings(name: str, saved: dict[str, Any], notices: list[str]) -> GenerationConfig:
    """The settings of ``generation_config.json``, or of ``config.json`` if it is missing or broken, as in Hugging Face."""
    try:
        path = find_file(name, "generation_config.json")
    except OSError:  # the hub has none
        path = None
    settings = saved
    if path is not None and path.exists():
        try:
            settings = read_json(path)
        except ModelLoadError as error:
            notices.append(f"{error}; the generation settings of config.json are used instead")
    return read_settings(settings, saved.get("eos_token_id"), notices)


def _check_all_fit(name: str, info: dict[str, Any]) -> None:
    mismatched = sorted((str(key), tuple(found), tuple(wanted)) for key, found, wanted in info.get("mismatched_keys") or ())
    if mismatched:
        key, found, wanted = mismatched[0]
        axis = next((index for index, sizes in enumerate(zip(found, wanted)) if sizes[0] != sizes[1]), 0)
        setting = {"transformer.wte.weight": "vocab_size", "transformer.wpe.weight": "n_positions"}.get(key)
        fix = "correct config.json" if setting is None or axis else f"set {setting} to {found[0]} in config.json"
        others = f" (and {len(mismatched) - 1} more do not fit)" if len(mismatched) > 1 else ""
        raise ModelLoadError(
            f"the weights of {name!r} do not fit its config: {key} is {list(found)} in the weights and {list(wanted)} by "
            f"config.json{others}: {fix}, or save both anew with save_pretrained"
        )
    for problem in ("missing_keys", "error_msgs"):
        if info.get(problem):
            lacking, unknown = sorted(map(str, info[problem])), sorted(info.get("unexpected_keys") or ())
            instead = f"; the weights hold {_first(unknown)} instead" if unknown else ""
            fix = "correct config.json"
            if lacking == ["lm_head.weight"]:
                fix = "set tie_word_embeddings to true in config.json if the embeddings are the head"
            raise ModelLoadError(
                f"the weights of {name!r} do not fit its config: {problem} {lacking[:3]} ({len(lacking)} in all){instead}: "
                f"{fix}, or save both anew with save_pretrained"
            )


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:2])}{' and others' if len(names) > 2 else ''}"


def _read_config(name: str) -> tuple[GPT2Config, dict[str, Any]]:
    """The config of a folder or hub model, and its JSON. Raises ``ModelLoadError``."""
    check_is_folder(name, "model")
    check_has_config(name)
    what = f"the config of {name!r}"
    saved = read_json(_attempt(what, MODEL_HINT, lambda: find_file(name, "config.json")))
    _check_kind(name, saved)
    plain = dict(saved)
    if type(plain.get("eos_token_id", 0)) is not int:
        # Hugging Face's class refuses a null in a list. ``saved`` keeps all the ids.
        ends = plain.pop("eos_token_id", None)
        plain["eos_token_id"] = [end for end in ends if type(end) is int] if isinstance(ends, list) else None
    hf_config: GPT2Config = _attempt(what, MODEL_HINT, lambda: GPT2Config.from_dict(plain))
    for setting in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if getattr(hf_config, setting) < 1:
            raise ModelLoadError(f"{what} says {setting}={getattr(hf_config, setting)}, expected at least 1: correct it")
    if hf_config.n_embd % hf_config.n_head:
        raise ModelLoadError(
            f"{what} says n_embd={hf_config.n_embd}, expected a multiple of n_head={hf_config.n_head}: correct it"
        )
    if find_activation(hf_config.activation_function) is None:
        raise ModelLoadError(
            f"{what} says activation_function={hf_config.activation_function!r}, which is unknown: correct it"
        )
    return hf_config, saved


def find_file(name: str, file: str) -> Path:
    """The path of a file of a folder or hub model. Raises ``OSError`` if the hub has none; in a folder it may be missing."""
    return Path(name, file) if os.path.isdir(name) else Path(str(cached_file(name, file)))


def _check_kind(name: str, saved: dict[str, Any]) -> None:
    """Raise ``ModelLoadError`` for a config of another kind. A config without a kind is GPT-2's, as in Hugging Face."""
    kind, classes = saved.get("model_type"), saved.get("architectures")
    if kind is None and isinstance(classes, list) and classes and not any(str(item).startswith("GPT2") for item in classes):
        kind = classes[0]
    if kind is not None and str(kind) not in READERS:
        code = " with code of its own (auto_map), which PageBrain never runs" if "auto_map" in saved else ""
        raise ModelLoadError(
            f"{name!r} is a {kind} model{code}, and PageBrain serves {' and '.join(READERS)} models only: {MODEL_HINT}"
        )
    if saved.get("add_cross_attention"):
        raise ModelLoadError(
            f"{name!r} has cross-attention layers, which PageBrain does not serve: use a decoder-only GPT-2"
        )
    if saved.get("quantization_config"):
        raise ModelLoadError(f"{name!r} is quantized, which PageBrain does not serve: name the model that it was made from")


def _dummy_model(config: PageBrainConfig) -> "GPT2LMHeadModel":
    hf_config = read_config(config)
    _check_read_by_hugging_face(_model_name(config), hf_config)
    hf_config._attn_implementation = "eager"
    where = torch.device(config.device)  # drawn on the device: a GPU takes 0.1 s, with other numbers than a CPU
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []), where:
        torch.manual_seed(config.seed % 2**63)
        from transformers import GPT2LMHeadModel

        return GPT2LMHeadModel(hf_config)


def _attempt(what: str, hint: str, load: Callable[[], Loaded]) -> Loaded:
    """Run one of Hugging Face's loaders. Any exception becomes a ``ModelLoadError`` of one line, without their advice."""
    try:
        return load()
    except Exception as error:
        raise ModelLoadError(f"{what} could not be read: {_reason(error)}; {hint}") from error


def _reason(error: Exception) -> str:
    """The reason in one line: the beginning of the error's first line."""
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises to run the code in the file
        return "a file holds more than tensors, or is damaged, and reading it could run code in it"
    cause = error.__cause__ if isinstance(error, StrictDataclassFieldValidationError) else error
    reason = " ".join(str(cause).split()) or type(error).__name__
    if len(reason) > _MAX_REASON_CHARACTERS:
        reason = " ".join(str(cause).strip().partition("\n")[0].split())
    if len(reason) > _MAX_REASON_CHARACTERS:
        sentences = reason[:_MAX_REASON_CHARACTERS].rpartition(". ")[0]
        return sentences or reason[:_MAX_REASON_CHARACTERS] + " ..."
    return reason.rstrip(".:")
