"""Opens the checkpoint of the engine's own model.

Safetensors files are read directly into the model's layers, a tensor at a time, if they hold exactly the model's tensors. In
all other cases Hugging Face reads the weights (:mod:`pagebrain.models.loading`): ``.bin`` files, tensors under old names,
random weights, and files that do not fit, for which it reports the tensors that are missing, unexpected or misshapen.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from pagebrain.config import PageBrainConfig
from pagebrain.generation_config import generation_notices
from pagebrain.model_config import ModelConfig
from pagebrain.models.loading import FoundModel, find_file, find_model, load_model, load_weights_of
from pagebrain.models.registry import ARCHITECTURES, is_whole
from pagebrain.models.weights import Checkpoint, SavedTensors


def open_checkpoint(config: PageBrainConfig, notices: list[str] | None = None) -> Checkpoint:
    """The model that ``config`` names, in its dtype and on its device.

    ``notices`` gets a line for each part that is left out and for settings that do not apply by themselves.

    Raises ``ModelLoadError`` if there is no such model, it is incomplete, or it is not a GPT-2.
    """
    notices = [] if notices is None else notices
    config = config.with_device_and_dtype()
    if config.load_format == "dummy":
        model = load_model(config)
        notices += generation_notices(model)
        return Checkpoint.of(model)
    found = find_model(config, notices)
    model_config = ModelConfig.from_hf(found.config, found.generation_config)
    device = torch.device(config.device)
    tensors = _saved_tensors(found, model_config, config.torch_dtype, device)
    if tensors is not None:
        checkpoint = Checkpoint(model_config, tensors, config.torch_dtype, device)
    else:
        checkpoint = Checkpoint.of(load_weights_of(found, config, notices))
    notices += generation_notices(found)
    return checkpoint


def _saved_tensors(
    found: FoundModel, model_config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> SavedTensors | None:
    """The tensors of a saved model; ``None`` if they are not in safetensors files, or not exactly the model's."""
    if getattr(found.config, "transformers_weights", None):  # this setting names another file of weights
        return None
    try:
        saved = SavedTensors(_files(found.name), ARCHITECTURES[model_config.architecture].prefix, dtype, device)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return saved if is_whole(model_config, saved) else None


def _files(name: str) -> list[Path]:
    """The safetensors files of a folder or hub model. Raises ``OSError`` if there are none."""
    try:
        return [_existing(name, "model.safetensors")]
    except OSError:
        index = json.loads(_existing(name, "model.safetensors.index.json").read_text(encoding="utf-8"))
        return [_existing(name, file) for file in sorted(set(index["weight_map"].values()))]


def _existing(name: str, file: str) -> Path:
    path = find_file(name, file)
    if not path.is_file():
        raise FileNotFoundError(path)
    return path
