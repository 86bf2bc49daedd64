"""The models that PageBrain has, by the name of their class in Hugging Face's library.

A further model takes a module like :mod:`pagebrain.models.gpt2` (layers and a table of tensor names), a reading of its
config in :mod:`pagebrain.model_config`, and an entry here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from pagebrain.model_config import ModelConfig
from pagebrain.models import gpt2
from pagebrain.models.model import Model
from pagebrain.models.weights import Checkpoint, SavedTensors, TensorNames, fits, load_weights


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        model: its class here, which is made from a config.
        tensor_names: layer of the model -> layer of a checkpoint.
        prefix: of the names in a checkpoint; one that was saved without the head leaves it out.
        unused: names of tensors that old checkpoints hold and no model needs.
    """

    model: Callable[[ModelConfig], Model]
    tensor_names: TensorNames
    prefix: str
    unused: re.Pattern[str]


ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture(
        model=gpt2.GPT2,
        tensor_names=gpt2.TENSOR_NAMES,
        prefix="transformer.",
        unused=re.compile(r"\.attn\.(masked_)?bias$"),  # the causal mask
    ),
}


def build_model(checkpoint: Checkpoint) -> Model:
    """The model of a checkpoint, which keeps its tensors. Raises ``ModelLoadError`` if one is missing or misshapen."""
    architecture = ARCHITECTURES[checkpoint.config.architecture]
    model = architecture.model(checkpoint.config).eval()
    load_weights(model, checkpoint.tensors, architecture.tensor_names, checkpoint.config.tied_head)
    return model


def is_whole(config: ModelConfig, saved: SavedTensors) -> bool:
    """Whether safetensors files hold exactly the tensors of such a model, in their shapes."""
    architecture = ARCHITECTURES[config.architecture]
    return fits(architecture.model(config), saved, architecture.tensor_names, config.tied_head, architecture.unused)
