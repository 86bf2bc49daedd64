"""Loads tensors into a model's layers by a table of names.

The tensors of a :class:`Checkpoint` are those of a Hugging Face model, which are shared, or those of safetensors files,
which :class:`SavedTensors` reads one at a time.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pagebrain.errors import ModelLoadError
from pagebrain.model_config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TensorNames = Mapping[str, str]
"""Layer of a model -> layer of a checkpoint. ``*`` stands for the number of a transformer layer."""


@dataclass(frozen=True)
class Checkpoint:
    """A model that is not built yet.

    Attributes:
        config: the model's shape.
        tensors: by their names in Hugging Face's model; a tied head may be missing.
        dtype, device: of all tensors.
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, base: "PreTrainedModel") -> "Checkpoint":
        """The tensors of a Hugging Face model, which may be dropped afterwards."""
        return cls(ModelConfig.of(base), base.state_dict(keep_vars=True), base.dtype, base.device)


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files. Each access reads and converts a tensor.

    Args:
        files: all files of the model.
        prefix: of the names in Hugging Face's model. Files of a model that was saved without its head have no prefix.
        dtype, device: of the returned tensors.

    Raises:
        OSError, SafetensorError: if a file cannot be read.
    """

    def __init__(self, files: list[Path], prefix: str, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._places: dict[str, tuple[Any, str]] = {}  # name -> (open file, name in it)
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            saved = [(file, name) for file in opened for name in file.keys()]  # noqa: SIM118  (a file is no mapping)
            has_prefix = any(name.startswith(prefix) for _, name in saved)
            for file, name in saved:
                self._places[name if has_prefix else prefix + name] = file, name
            self._files = stack.pop_all()  # stay open as long as this object lives

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor, without reading it."""
        file, saved_name = self._places[name]
        return torch.Size(file.get_slice(saved_name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        file, saved_name = self._places[name]
        tensor: Tensor = file.get_tensor(saved_name)  # a view of the file, which may change later
        return tensor.to(self._device, self._dtype, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], names: TensorNames, tied_head: bool) -> None:
    """Set each parameter of ``model`` to its tensor, without a copy.

    Args:
        model: with shapes and without weights.
        tensors: by their names in a checkpoint; each is read once.
        names: see :data:`TensorNames`.
        tied_head: whether the head is the embedding table.

    Raises:
        ModelLoadError: if a tensor is missing or has another shape.
    """
    for source, targets in sources(model, names, tied_head).items():
        if source not in tensors:
            raise ModelLoadError(f"the weights hold no {source}: use a checkpoint of the same model")
        tensor = tensors[source]
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        for target in targets:
            path, _, name = target.rpartition(".")
            layer = model.get_submodule(path)
            wanted = getattr(layer, name).shape
            if parameter.shape != wanted:
                raise ModelLoadError(
                    f"the weights hold {source} of shape {list(parameter.shape)}, expected {list(wanted)}: use a checkpoint "
                    "of the same model"
                )
            setattr(layer, name, parameter)


def sources(model: nn.Module, names: TensorNames, tied_head: bool) -> dict[str, list[str]]:
    """Name of a tensor in a checkpoint -> names of the model's parameters with this tensor: two if the head is tied."""
    if tied_head:
        names = {**names, "lm_head": names["wte"]}
    found: dict[str, list[str]] = {}
    for target, _ in model.named_parameters(remove_duplicate=False):
        path, _, name = target.rpartition(".")
        number = re.search(r"\.(\d+)\.", path)
        if number is None:
            source = names[path]
        else:
            source = names[path.replace(number[0], ".*.", 1)].replace("*", number[1])
        found.setdefault(f"{source}.{name}", []).append(target)
    return found


def fits(model: nn.Module, saved: SavedTensors, names: TensorNames, tied_head: bool, unused: re.Pattern[str]) -> bool:
    """Whether ``saved`` holds exactly the model's tensors in the right shapes, apart from names that match ``unused``."""
    wanted = sources(model, names, tied_head)
    if {name for name in saved if not unused.search(name)} != set(wanted):
        return False
    return all(model.get_parameter(targets[0]).shape == saved.shape(name) for name, targets in wanted.items())
