"""PageBrain's models, by the name of their class in Hugging Face's library.

To add a model, write a module like :mod:`pagebrain.models.gpt2` (layers and a table of tensor names), a function that reads
its config in :mod:`pagebrain.model_config`, and an entry here.
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
        model: PageBrain's class, which is made from a config.
        tensor_names: layer of the model -> layer of a checkpoint.
        prefix: of the names in a checkpoint. A checkpoint that was saved without the head has no prefix.
        unused: pattern of tensor names in old checkpoints that the model does not need.
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
"""By the ``architecture`` of a :class:`~pagebrain.model_config.ModelConfig`."""


def build_model(checkpoint: Checkpoint) -> Model:
    """The model of a checkpoint, with its tensors. Raises ``ModelLoadError`` if one is missing or has a wrong shape."""
    architecture = ARCHITECTURES[checkpoint.config.architecture]
    model = architecture.model(checkpoint.config).eval()
    load_weights(model, checkpoint.tensors, architecture.tensor_names, checkpoint.config.tied_head)
    return model


def is_whole(config: ModelConfig, saved: SavedTensors) -> bool:
    """Whether safetensors files hold exactly the tensors of such a model, in the right shapes."""
    architecture = ARCHITECTURES[config.architecture]
    return fits(architecture.model(config), saved, architecture.tensor_names, config.tied_head, architecture.unused)
