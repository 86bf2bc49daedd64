"""The configuration object: frozen, validated when made, and resolved against a model before the engine is built.

A :class:`PageBrainConfig` starts with the user's settings and defaults. :meth:`PageBrainConfig.for_model` adds what depends
on the loaded model and the machine: its shape, the device, the number of blocks. The parts of the engine take a resolved
config and do not check it again.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from pagebrain import machine
from pagebrain.errors import ConfigError
from pagebrain.model_config import ModelConfig
from pagebrain.swap_space import PreemptionMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Supported dtypes of weights, activations and K/V by name."""

PARTS = ("block_manager", "attention", "scheduler", "sampler")
"""Names of the parts that can be replaced."""

MAX_BLOCK_SIZE = 1024


@dataclass(frozen=True)
class PageBrainConfig:
    """All settings of an engine.

    Attributes:
        model: hub name or folder of a GPT-2; ``None`` is the bundled model.
        tokenizer: hub name or folder; ``None`` is the model's own.
        load_format: ``auto`` reads weights, ``dummy`` draws random ones for a known GPT-2 size or a folder's config.
        dtype: ``auto`` (float32 on a CPU, bfloat16 on a GPU) or one of float64, float32, bfloat16, float16.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        block_size: token slots in a block.
        num_blocks: number of physical blocks; ``None`` derives it from ``memory_fraction``.
        memory_fraction: share of the memory that is free after the model is loaded, in (0, 1], for K and V. ``None`` is 0.9
            on a GPU and 0.3 on a CPU, where a container's limit and ``ulimit`` count (:mod:`pagebrain.machine`).
        max_num_seqs: largest number of sequences in one step; ``None`` is 64 on a CPU, 256 on a GPU.
        max_num_batched_tokens: largest number of tokens in one step. Longer prompts are computed in chunks. ``None`` is 512
            on a CPU, 16,384 on a GPU.
        max_model_len: largest number of tokens of prompt and output; ``None`` derives it from the model's positions and the
            blocks.
        async_scheduling: launch the next step before the last one is read (depth 1); ``None`` is true on a GPU.
        cuda_graphs: replay decode steps as CUDA graphs; ``None`` is true on a GPU.
        swap_space_gib: CPU memory for K and V of preempted sequences, in GiB; 0 for none.
        preemption_mode: how a preempted sequence continues. ``recompute`` computes its tokens again, ``swap`` copies them to
            the swap space and back, and ``auto`` does what is quicker as measured. Without room there: ``recompute``.
        prefix_caching: keep the blocks of sequences that ended, and let a prompt that begins with the same tokens use them.
        seed: engine seed; requests without a seed derive theirs from it and from their arrival number.
        check_integrity: verify the bookkeeping of all blocks after every step (slow; for tests and debugging).
        parts: part name -> object or ``path:Name`` that replaces the engine's own part.
        num_layers, num_heads, head_dim, vocab_size: the model's, set by :meth:`for_model`.
        eos_token_ids: the tokens that end a text, from the model's config or generation config; set by :meth:`for_model`.

    Raises:
        ConfigError: it names the setting, the value and what to do.
    """

    model: str | None = None
    tokenizer: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: str = "auto"
    device: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    memory_fraction: float | None = None
    max_num_seqs: int = None  # type: ignore[assignment]  # __post_init__ sets a number, in the next one too
    max_num_batched_tokens: int = None  # type: ignore[assignment]
    max_model_len: int | None = None
    async_scheduling: bool | None = None
    cuda_graphs: bool | None = None
    prefix_caching: bool = True
    swap_space_gib: float = 0.0
    preemption_mode: PreemptionMode = "auto"
    seed: int = 0
    check_integrity: bool = False
    parts: Mapping[str, Any] = field(default_factory=dict)
    num_layers: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", _checked_device(self.device))
        self._fill_in_sizes()
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            _check_int(name, getattr(self, name), 1)
        if self.block_size > MAX_BLOCK_SIZE:
            raise ConfigError(f"block_size must be at most {MAX_BLOCK_SIZE}, got {self.block_size}")
        for name in ("num_blocks", "num_layers", "num_heads", "head_dim", "vocab_size"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        if self.max_model_len is not None:
            _check_int("max_model_len", self.max_model_len, 2)
        _check_int("seed", self.seed, None)
        for name, allowed in (
            ("async_scheduling", None),
            ("cuda_graphs", None),
            ("prefix_caching", False),
            ("check_integrity", False),
        ):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or allowed is not None):
                raise ConfigError(f"{name} must be True or False, got {value!r}")
        if self.cuda_graphs and self.device == "cpu":
            raise ConfigError("cuda_graphs=True needs a CUDA GPU, and the device is 'cpu': leave it out")
        _check_choice("load_format", self.load_format, ("auto", "dummy"))
        _check_choice("dtype", self.dtype, ("auto", *DTYPES))
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that all running sequences can decode in one step: raise the first or lower the "
                "second"
            )
        fraction = self.memory_fraction
        if fraction is not None and not (isinstance(fraction, (int, float)) and 0 < fraction <= 1):
            raise ConfigError(f"memory_fraction must be greater than 0 and at most 1, got {fraction!r}")
        space = self.swap_space_gib
        if isinstance(space, bool) or not (isinstance(space, (int, float)) and 0 <= space < math.inf):
            raise ConfigError(f"swap_space_gib must be a number, at least 0 and finite, got {space!r}")
        _check_choice("preemption_mode", self.preemption_mode, ("auto", "recompute", "swap"))
        if self.preemption_mode == "swap" and not space:
            raise ConfigError("preemption_mode='swap' needs swap_space_gib > 0: set it, or leave preemption_mode out")
        for part in self.parts:
            _check_choice("parts", part, PARTS)
        if self.num_blocks is not None and self.max_model_len is not None:
            self._check_blocks_hold_a_sequence(self.num_blocks, self.max_model_len)

    def _fill_in_sizes(self) -> None:
        """Set a batch size for the device: a GPU computes hundreds of sequences in little more time than one."""
        on_gpu = _found_device(self.device) != "cpu"
        num_seqs, num_tokens = (256, 16384) if on_gpu else (64, 512)
        asked_tokens, asked_seqs = self.max_num_batched_tokens, self.max_num_seqs
        if asked_seqs is None:
            num_seqs = min(num_seqs, max(1, asked_tokens)) if isinstance(asked_tokens, int) else num_seqs
            object.__setattr__(self, "max_num_seqs", num_seqs)
        if asked_tokens is None:
            num_tokens = max(num_tokens, asked_seqs) if isinstance(asked_seqs, int) else num_tokens
            object.__setattr__(self, "max_num_batched_tokens", num_tokens)

    def with_device_and_dtype(self) -> "PageBrainConfig":
        """This config with ``auto`` replaced: a GPU if there is one, float32 on a CPU, bfloat16 on a GPU."""
        device, dtype = _found_device(self.device), self.dtype
        if device == "cuda":
            device = f"cuda:{torch.cuda.current_device()}"
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        return dataclasses.replace(self, device=device, dtype=dtype)

    @classmethod
    def for_model(cls, base: "PreTrainedModel", **settings: Any) -> "PageBrainConfig":
        """A resolved config for ``base``: shape, dtype and device are the model's, and ``num_blocks`` is set.

        Raises ``ConfigError`` for a model that PageBrain cannot run, and for settings that contradict the model.
        """
        config = cls(**({"device": str(base.device)} | settings))
        return config.resolved_for(ModelConfig.of(base), base.dtype, base.device)

    def resolved_for(
        self, model: ModelConfig, dtype: torch.dtype, device: torch.device, reserved_bytes: int = 0
    ) -> "PageBrainConfig":
        """This config with all values that depend on the model, its ``device`` and the machine.

        ``reserved_bytes`` of the free memory are kept for what a step needs besides K and V.
        """
        of_model: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "num_layers": model.num_layers,
            "num_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "vocab_size": model.vocab_size,
        }
        for name, value in of_model.items():
            asked = getattr(self, name)
            if asked not in ("auto", None, value) and not (name == "device" and asked == device.type):
                raise ConfigError(
                    f"{name}={asked!r} was asked for, but the model has {value!r}: convert it, or leave this out"
                )
        on_gpu = device.type == "cuda"
        if self.async_scheduling is None:
            of_model["async_scheduling"] = on_gpu
        if self.cuda_graphs is None:
            of_model["cuda_graphs"] = on_gpu
        max_model_len = self.max_model_len
        if max_model_len is not None and max_model_len > model.max_positions:
            raise ConfigError(
                f"max_model_len must be at most the model's {model.max_positions} positions, got {max_model_len}"
            )
        shaped = dataclasses.replace(
            self,
            **of_model,
            eos_token_ids=model.eos_token_ids,
        )
        length = max_model_len or model.max_positions
        num_blocks = self.num_blocks or shaped._blocks_that_fit(length, reserved_bytes)
        shaped._check_memory_holds(num_blocks)
        shaped._check_swap_space(num_blocks)
        if max_model_len is None:
            length = min(length, num_blocks * self.block_size)
            if length < 2:
                raise ConfigError(
                    f"num_blocks={num_blocks} of block_size={self.block_size} hold {length} token: use at least 2"
                )
        return dataclasses.replace(shaped, num_blocks=num_blocks, max_model_len=length)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch dtype. The config must be resolved."""
        return DTYPES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in all layers."""
        num_layers, num_heads, head_dim = self.require_shape()
        return 2 * num_layers * num_heads * head_dim * self.torch_dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of K and V of one block in all layers."""
        return self.block_size * self.token_bytes

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def require_shape(self) -> tuple[int, int, int]:
        """``(num_layers, num_heads, head_dim)``. Raises ``ConfigError`` if the config is not resolved."""
        if self.num_layers is None or self.num_heads is None or self.head_dim is None:
            raise ConfigError("the config does not know its model yet: make it with PageBrainConfig.for_model(base, ...)")
        return self.num_layers, self.num_heads, self.head_dim

    def _memory(self) -> machine.MemoryLimit:
        """The free memory, which limits K and V."""
        if self.device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info(self.device)
            return machine.MemoryLimit(int(total), int(free), "the GPU's memory")
        return machine.available_memory()

    def _check_memory_holds(self, num_blocks: int) -> None:
        available = self._memory()
        if num_blocks * self.block_bytes > available.free_bytes:
            raise ConfigError(
                f"num_blocks={num_blocks} of {self.block_bytes} bytes each take {num_blocks * self.block_bytes / 1e9:,.2f} "
                f"GB for K and V, and there are {available}: use fewer than {available.free_bytes // self.block_bytes + 1}"
            )

    @property
    def num_swap_blocks(self) -> int:
        """Blocks that the swap space holds."""
        return int(self.swap_space_gib * 2**30 // self.block_bytes) if self.swap_space_gib else 0

    def _check_swap_space(self, num_blocks: int) -> None:
        """Raise ``ConfigError`` if the swap space holds no block, or if the CPU's memory cannot hold it."""
        if not self.swap_space_gib:
            return
        if not self.num_swap_blocks:
            raise ConfigError(
                f"swap_space_gib={self.swap_space_gib:g} holds no block of {self.block_bytes:,} bytes: raise it"
            )
        available = machine.available_memory()
        taken = 0 if self.device.startswith("cuda") else num_blocks * self.block_bytes
        if self.num_swap_blocks * self.block_bytes > available.free_bytes - taken:
            raise ConfigError(
                f"swap_space_gib={self.swap_space_gib:g} does not fit: there are {available}"
                + (f", and K and V take {taken / 1e9:,.2f} GB of it" if taken else "")
                + ": lower it"
            )

    def _blocks_that_fit(self, max_model_len: int, reserved_bytes: int) -> int:
        """Number of blocks that fit into memory, but no more than ``max_num_seqs`` full sequences can use."""
        useful = self.max_num_seqs * self.blocks_for(max_model_len)
        available = self._memory()
        if self.device.startswith("cuda"):
            budget = max(0.0, available.free_bytes * (self.memory_fraction or 0.9) - reserved_bytes)
        else:  # reserve more, because libraries allocate memory later
            budget = max(0, available.free_bytes - reserved_bytes) * (self.memory_fraction or 0.3)
        fitting = math.floor(budget / self.block_bytes)
        if fitting < self.blocks_for(2):
            raise ConfigError(
                f"{budget:,.0f} bytes for K and V hold no block of {self.block_bytes:,}, with {available}: raise "
                "memory_fraction, or the limit"
            )
        num_blocks = min(useful, fitting)
        if self.max_model_len is not None:
            self._check_blocks_hold_a_sequence(num_blocks, self.max_model_len)
        return num_blocks

    def _check_blocks_hold_a_sequence(self, num_blocks: int, max_model_len: int) -> None:
        if num_blocks * self.block_size < max_model_len:
            raise ConfigError(
                f"num_blocks={num_blocks} of block_size={self.block_size} hold {num_blocks * self.block_size} tokens, fewer "
                f"than max_model_len={max_model_len}: use num_blocks >= {self.blocks_for(max_model_len)} or a smaller "
                "max_model_len"
            )


def with_own_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which four of vLLM's names are replaced by PageBrain's.

    ``gpu_memory_utilization`` is ``memory_fraction``, ``enable_prefix_caching`` is ``prefix_caching``, ``swap_space`` is
    ``swap_space_gib``, and ``enforce_eager=True`` is ``cuda_graphs=False``. Raises ``ConfigError`` if both names of one
    setting are given.
    """
    own = dict(settings)
    for name, own_name in (
        ("gpu_memory_utilization", "memory_fraction"),
        ("enable_prefix_caching", "prefix_caching"),
        ("swap_space", "swap_space_gib"),
    ):
        if name in own:
            if own.get(own_name) is not None:
                raise ConfigError(f"{name} and {own_name} are two names of one setting: give one of them")
            own[own_name] = own.pop(name)
    eager = own.pop("enforce_eager", False)
    if not isinstance(eager, bool):
        raise ConfigError(f"enforce_eager must be True or False, got {eager!r}")
    if eager:
        if own.get("cuda_graphs"):
            raise ConfigError("enforce_eager=True switches CUDA graphs off, and cuda_graphs=True switches them on: give one")
        own["cuda_graphs"] = False
    return own


def _check_int(name: str, value: object, low: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    if low is not None and value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _found_device(device: str) -> str:
    """``device``; ``auto`` is a GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _checked_device(device: object) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``, from a string or a ``torch.device``."""
    if device == "auto":
        return "auto"
    try:
        found = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but torch finds no CUDA GPU here: use device='cpu'")
    if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r} does not exist: this machine has {torch.cuda.device_count()} CUDA GPUs")
    return "cpu" if found.type == "cpu" else str(found)
