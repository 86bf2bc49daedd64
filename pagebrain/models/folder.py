"""Checks of a model's folder, with a one-line error for each fault.

Hugging Face's loaders try file names in turn, so their error for a folder that is incomplete, damaged or of another kind
names the last file that they tried. These checks run before them. They read names, sizes and headers, no weights.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pagebrain.errors import ModelLoadError

MODEL_HINT = "name a folder made with save_pretrained, a hub model (openai-community/gpt2), or none for the bundled model"

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which Hugging Face looks for them."""

_FILE_ENDINGS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
_TOKENIZER_ENDINGS = (".model", ".tiktoken")
_LFS_START = b"version https://git-lfs"
_COPY_AGAIN = "copy or download it again"


def check_is_folder(name: str, kind: str) -> None:
    """Raise ``ModelLoadError`` for the path of a file, a folder that does not exist, or one that cannot be read.

    A name that does not look like a path may be the name of a hub model, and passes.

    Args:
        name: the user's name of a model or tokenizer.
        kind: ``model`` or ``tokenizer``.
    """
    path = Path(name)
    try:
        os.stat(name)
    except PermissionError as error:
        raise ModelLoadError(f"the {kind} folder {name} cannot be read: {error.strerror}; check its permissions") from None
    except (OSError, ValueError):  # there is no such file, or the name is not valid for a file
        pass
    if os.path.isfile(name):
        raise ModelLoadError(f"{name} is a file, and a {kind} is a folder: {_instead_of_file(path, kind)}")
    looks_like_path = name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or os.path.isabs(name)
    if (looks_like_path or name.lower().endswith(_FILE_ENDINGS)) and not os.path.isdir(name):
        own = "the bundled model" if kind == "model" else "the model's own"
        raise ModelLoadError(f"there is no {kind} folder {name}: check the path, or leave it out for {own}")
    if os.path.isdir(name):
        _names_in(path)


def check_has_config(name: str) -> None:
    """Raise ``ModelLoadError`` for a folder without ``config.json`` or with an adapter. Hub names are not checked."""
    if not os.path.isdir(name):
        return
    folder = Path(name)
    names = _names_in(folder)
    if "adapter_config.json" in names:
        adapter = read_json(folder / "adapter_config.json")
        raise ModelLoadError(
            f"the folder {name} holds an adapter for {adapter.get('base_model_name_or_path')!r}, which PageBrain does not "
            "apply: merge the two (peft's merge_and_unload), save the result with save_pretrained, and name that folder"
        )
    if "config.json" in names:
        return
    if not names:
        raise ModelLoadError(f"the folder {name} is empty: {MODEL_HINT}")
    inner = [entry for entry in names if (folder / entry / "config.json").is_file()]
    if inner:
        raise ModelLoadError(f"the folder {name} has no config.json, but {_listed(inner)} in it: name one of them")
    raise ModelLoadError(f"the folder {name} has no config.json, it holds {_listed(names)}: {MODEL_HINT}")


def check_has_weights(name: str) -> None:
    """Raise ``ModelLoadError`` for a folder without weights, or with files of weights missing, truncated or LFS pointers."""
    if not os.path.isdir(name):
        return
    folder = Path(name)
    names = _names_in(folder)
    found = next((file for file in _WEIGHT_FILES if file in names), None)
    if found is None:
        raise ModelLoadError(
            f"the folder {name} has no weights (none of {', '.join(_WEIGHT_FILES)}), it holds {_listed(names)}: save the "
            "model there with save_pretrained, or name another folder"
        )
    for path in _shards(folder / found) if found.endswith(".index.json") else [folder / found]:
        _check_weights_file(path)


def has_tokenizer(name: str) -> bool:
    """Whether a folder holds a tokenizer's vocabulary or settings. Some tokenizers need no vocabulary."""
    return os.path.isfile(os.path.join(name, "tokenizer_config.json")) or has_vocabulary(name)


def has_vocabulary(name: str) -> bool:
    """Whether a folder holds a vocabulary file that Hugging Face's tokenizers read."""
    names = _names_in(Path(name)) if os.path.isdir(name) else []
    return any(file in _VOCABULARIES or file.endswith(_TOKENIZER_ENDINGS) for file in names)


def check_tokenizer_files(name: str) -> None:
    """Raise ``ModelLoadError`` if a tokenizer file cannot be read, is an LFS pointer, or is not the JSON that it must be."""
    if not os.path.isdir(name):
        return
    for file in sorted(_names_in(Path(name))):
        path = Path(name, file)
        if file in _TOKENIZER_JSON:
            read_json(path)
        elif file == "chat_template.jinja":
            _read_text(path)
        elif file in _VOCABULARIES or file.endswith(_TOKENIZER_ENDINGS):
            _check_can_be_read(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ``ModelLoadError`` if the file holds anything else."""
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ModelLoadError(
            f"{path} could not be read: it is no JSON ({error.msg}, {where}); correct it, or {_COPY_AGAIN}"
        ) from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, got {type(value).__name__}: correct it, or {_COPY_AGAIN}")
    return value


def _read_text(path: Path) -> str:
    _check_can_be_read(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{path} could not be read: byte {error.start} is no UTF-8 text; {_COPY_AGAIN}") from error


def names_own_code(folder: str) -> bool:
    """Whether a folder's config or tokenizer names its own Python code. PageBrain never runs it."""
    paths = [Path(folder, file) for file in ("config.json", "tokenizer_config.json")]
    return any("auto_map" in read_json(path) for path in paths if os.path.isfile(path))


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ModelLoadError(f"the folder {folder} cannot be read: {error.strerror}; check its permissions") from error


def _check_can_be_read(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_START))
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from error
    if start == _LFS_START:
        raise ModelLoadError(f"{path} is a pointer of Git LFS, and not the file itself: run 'git lfs pull' in its folder")


def _check_weights_file(path: Path) -> None:
    _check_can_be_read(path)
    num_bytes = path.stat().st_size
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelLoadError(
                f"{path} ({num_bytes:,} bytes) is cut short or no safetensors file ({error}): {_COPY_AGAIN}"
            ) from error
    elif not num_bytes:
        raise ModelLoadError(f"{path} is empty: {_COPY_AGAIN}")


def _shards(index: Path) -> list[Path]:
    """The files in an index of weights. Raises ``ModelLoadError`` if it names none, or some are missing."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(read_json(index).get("metadata"), dict):
        raise ModelLoadError(f"{index} must have a weight_map of names and files, and metadata: {_COPY_AGAIN}")
    names = sorted(set(map(str, weight_map.values())))
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise ModelLoadError(
            f"{index} names {len(names)} files of weights, of which these are missing: {_listed(missing)}; copy or download "
            "them"
        )
    return [index.parent / name for name in names]


def _instead_of_file(path: Path, kind: str) -> str:
    if path.suffix == ".gguf":
        return "PageBrain does not read GGUF; name the folder or hub model that it was made from"
    if (path.parent / "config.json").is_file():
        return f"name its folder, {path.parent}"
    return f"name the folder that holds it beside {'config.json' if kind == 'model' else 'the rest of its files'}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
