"""The shape of a model, under names that fit every family: sizes, activation, scales, end tokens.

Hugging Face names the same sizes differently for each family. After a config was read, all code uses the names here.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pagebrain.errors import ConfigError
from pagebrain.generation_config import end_tokens

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedModel


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only model.

    Attributes:
        architecture: its name in Hugging Face's library and in ``pagebrain.models.registry.ARCHITECTURES``.
        vocab_size: rows of the embedding table, and columns of the logits.
        max_positions: most tokens in a sequence.
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        num_heads, num_kv_heads: heads of the queries, and of K and V. ``num_heads`` is a multiple of ``num_kv_heads``.
        head_dim: numbers in a head.
        intermediate_size: width inside the MLP.
        activation: of the MLP, by Hugging Face's name.
        norm_eps: added to the variance in norms.
        tied_head: whether the head is the embedding table.
        attention_scales: the factor on the attention scores of each layer.
        eos_token_ids: the tokens that end a text.
    """

    architecture: str
    vocab_size: int
    max_positions: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    norm_eps: float
    tied_head: bool
    attention_scales: tuple[float, ...]
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, base: "PreTrainedModel") -> "ModelConfig":
        """The config of a Hugging Face model. Raises what :meth:`from_hf` raises."""
        config = cls.from_hf(base.config, getattr(base, "generation_config", None))
        head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
        is_tied = head.weight is base.get_input_embeddings().weight  # the tensors decide, not the config
        return replace(config, tied_head=is_tied)

    @classmethod
    def from_hf(cls, hf_config: Any, generation_config: Any = None) -> "ModelConfig":
        """From Hugging Face's config, and its generation config, which may name more end tokens.

        Raises ``ConfigError`` for a model that PageBrain cannot run.
        """
        if hf_config.model_type not in READERS:
            raise ConfigError(f"the model is a {hf_config.model_type} model, and PageBrain serves {', '.join(READERS)}")
        return READERS[hf_config.model_type](hf_config, generation_config)


def _from_gpt2(hf: "GPT2Config", generation_config: Any) -> ModelConfig:
    if getattr(hf, "add_cross_attention", False):
        raise ConfigError("the model has cross-attention layers, which PageBrain does not serve: use a decoder-only GPT-2")
    return ModelConfig(
        architecture="GPT2LMHeadModel",
        vocab_size=hf.vocab_size,
        max_positions=hf.n_positions,
        num_layers=hf.n_layer,
        hidden_size=hf.n_embd,
        num_heads=hf.n_head,
        num_kv_heads=hf.n_head,
        head_dim=hf.n_embd // hf.n_head,
        intermediate_size=hf.n_inner or 4 * hf.n_embd,
        activation=hf.activation_function,
        norm_eps=hf.layer_norm_epsilon,
        tied_head=hf.tie_word_embeddings,
        attention_scales=tuple(attention_scale(hf, layer) for layer in range(hf.n_layer)),
        eos_token_ids=end_tokens(hf, generation_config)[0],
    )


READERS = {"gpt2": _from_gpt2}
"""By ``model_type`` of Hugging Face's config. The ``architecture`` that a reader sets is looked up in
:data:`pagebrain.models.registry.ARCHITECTURES`."""


def attention_scale(config: "GPT2Config", layer: int) -> float:
    """The factor on the attention scores of one layer of GPT-2.

    ``scale_attn_weights`` and ``scale_attn_by_inverse_layer_idx`` determine it. The third flag,
    ``reorder_and_upcast_attn``, means scores and softmax in float32, which paged attention always uses.
    """
    scale: float = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale
