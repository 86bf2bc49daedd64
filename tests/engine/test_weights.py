"""Weights on their way into layers: shared with a Hugging Face model, or read one tensor at a time from safetensors."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from pagebrain import LLM, PageBrainConfig, SamplingParams
from pagebrain.errors import ConfigError, ModelLoadError
from pagebrain.layers import Linear, prepare
from pagebrain.layers.linear import can_pack
from pagebrain.model_config import ModelConfig
from pagebrain.models.checkpoints import open_checkpoint
from pagebrain.models.registry import ARCHITECTURES, build_model
from pagebrain.models.weights import Checkpoint, SavedTensors, sources
from tests.support.models import hf_greedy, random_gpt2

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = [5, 6, 7]


def config_of(folder: Path) -> PageBrainConfig:
    return PageBrainConfig(model=str(folder), device="cpu", dtype="float32")


def tokens_of(folder: Path, **settings: Any) -> list[int]:
    llm = LLM(str(folder), device="cpu", dtype="float32", load_format="auto", num_blocks=8, **settings)
    return list(llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A saved model; it has no tokenizer, which the engine is kept from looking for."""
    monkeypatch.setattr("pagebrain.build.load_text", lambda *_: (None, None, None))
    random_gpt2(torch.float32).save_pretrained(tmp_path)
    yield tmp_path


@pytest.fixture
def base() -> GPT2LMHeadModel:
    return random_gpt2(torch.float32)


def without_hugging_faces_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **settings: Any) -> None:
        raise AssertionError("Hugging Face's loader was called")

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", refused)


def rewrite(folder: Path, change: Any) -> None:
    """Save the tensors as ``change`` makes them of the old ones."""
    file = folder / "model.safetensors"
    tensors = change({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_of_names_covers_each_tensor_of_hugging_faces_model(tied: bool) -> None:
    base = random_gpt2(torch.float32, tie_word_embeddings=tied)
    config = ModelConfig.from_hf(base.config)
    wanted = sources(ARCHITECTURES["GPT2LMHeadModel"].model(config), ARCHITECTURES["GPT2LMHeadModel"].tensor_names, tied)
    assert set(wanted) == set(base.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert ("lm_head.weight" in wanted["transformer.wte.weight"]) == tied


def test_a_tensor_that_is_missing_or_misshapen_is_named(base: GPT2LMHeadModel) -> None:
    whole = Checkpoint.of(base)
    name = "transformer.h.1.mlp.c_fc.weight"
    lacking = {key: tensor for key, tensor in whole.tensors.items() if key != name}
    with pytest.raises(ModelLoadError, match=f"hold no {name}"):
        build_model(Checkpoint(whole.config, lacking, whole.dtype, whole.device))
    misshapen = {**whole.tensors, name: torch.zeros(48, 191)}
    with pytest.raises(ModelLoadError, match=rf"hold {name} of shape \[48, 191\], expected \[48, 192\]"):
        build_model(Checkpoint(whole.config, misshapen, whole.dtype, whole.device))


def test_safetensors_go_into_layers_without_hugging_faces_loader(
    folder: Path, base: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_hugging_faces_loader(monkeypatch)
    assert tokens_of(folder) == hf_greedy(base, PROMPT, 8)


@pytest.mark.parametrize("kind", ["sharded", "without prefix", "with the causal masks", "untied"])
def test_other_ways_to_save_the_same_model_are_read_too(
    kind: str, folder: Path, base: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "sharded":
        (folder / "model.safetensors").unlink()
        base.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    elif kind == "without prefix":
        rewrite(folder, lambda old: {name.removeprefix("transformer."): tensor for name, tensor in old.items()})
    elif kind == "with the causal masks":
        masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
        rewrite(folder, lambda old: old | masks)
    else:
        base = random_gpt2(torch.float32, tie_word_embeddings=False)
        base.save_pretrained(folder)
    without_hugging_faces_loader(monkeypatch)
    assert tokens_of(folder) == hf_greedy(base, PROMPT, 8)


def test_a_checkpoint_that_is_not_in_safetensors_goes_through_hugging_face(folder: Path, base: GPT2LMHeadModel) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(base.state_dict(), folder / "pytorch_model.bin")
    assert not isinstance(open_checkpoint(config_of(folder)).tensors, SavedTensors)
    assert tokens_of(folder) == hf_greedy(base, PROMPT, 8)


@pytest.mark.parametrize("fault", ["missing", "misshapen", "cut short"])
def test_safetensors_that_do_not_fit_are_refused_by_name(fault: str, folder: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.bias"
    if fault == "cut short":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    else:
        rewrite(folder, lambda old: old | {name: old[name][:-1].clone()} if fault == "misshapen" else without(old, name))
    with pytest.raises(ModelLoadError, match="is cut short" if fault == "cut short" else name):
        open_checkpoint(config_of(folder))


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def test_tensors_left_over_send_the_checkpoint_through_hugging_face(folder: Path, base: GPT2LMHeadModel) -> None:
    rewrite(folder, lambda old: old | {"transformer.h.7.ln_1.bias": torch.ones(48)})
    assert not isinstance(open_checkpoint(config_of(folder)).tensors, SavedTensors)
    assert tokens_of(folder) == hf_greedy(base, PROMPT, 8)


def test_the_notices_are_the_same_on_both_ways(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"eos_token_id": [3, 400], "temperature": 0.7, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    hf_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf_config | {"auto_map": {"AutoConfig": "mine.Config"}}))
    found: list[list[str]] = []
    for may_stream in (True, False):
        if not may_stream:
            monkeypatch.setattr("pagebrain.models.checkpoints.is_whole", lambda *_: False)
        notices: list[str] = []
        checkpoint = open_checkpoint(config_of(folder), notices)
        assert isinstance(checkpoint.tensors, SavedTensors) == may_stream and 3 in checkpoint.config.eos_token_ids
        found.append(notices)
    assert found[0] == found[1] and len(found[0]) == 3


def test_tensors_left_over_are_told_and_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder, lambda old: old | {"transformer.h.7.ln_1.bias": torch.ones(48)})
    monkeypatch.setattr(SavedTensors, "__getitem__", lambda *_: pytest.fail("a tensor was read that Hugging Face reads too"))
    notices: list[str] = []
    open_checkpoint(config_of(folder), notices)
    [line] = notices
    assert "that its config does not name are left out: transformer.h.7.ln_1.bias (1 in all)" in line


def test_a_head_that_differs_from_the_embeddings_is_used_although_the_config_says_that_they_are_one(
    folder: Path, base: GPT2LMHeadModel
) -> None:
    """As Hugging Face does, which keeps two tensors that differ."""
    head = torch.randn(97, 48, generator=torch.Generator().manual_seed(1))
    rewrite(folder, lambda old: old | {"lm_head.weight": head})
    theirs = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert theirs.config.tie_word_embeddings and theirs.lm_head.weight is not theirs.transformer.wte.weight
    assert hf_greedy(theirs, PROMPT, 8) != hf_greedy(base, PROMPT, 8)
    assert tokens_of(folder) == hf_greedy(theirs, PROMPT, 8)


def test_a_saved_tensor_is_read_once_converted_and_not_a_view_of_the_file(folder: Path) -> None:
    checkpoint = open_checkpoint(PageBrainConfig(model=str(folder), device="cpu", dtype="bfloat16"))
    read: list[str] = []

    class Noted(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.append(name)
            return checkpoint.tensors[name]

        def __contains__(self, name: object) -> bool:
            return name in checkpoint.tensors

    model: Any = build_model(Checkpoint(checkpoint.config, Noted(), checkpoint.dtype, checkpoint.device))
    assert sorted(read) == sorted(checkpoint.tensors)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.wte.weight
    before = model.wte.weight.clone()
    (folder / "model.safetensors").write_bytes(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert torch.equal(model.wte.weight, before)


def test_a_layer_that_packs_its_weight_drops_the_original_before_the_next_is_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So an engine that owns its weights needs memory for them and for one more."""
    if not can_pack(torch.float32, torch.device("cpu")):
        pytest.skip("this build of torch does not pack float32 weights")
    model = build_model(Checkpoint.of(random_gpt2(torch.float32)))
    weights = [weakref.ref(layer.weight) for layer in model.modules() if isinstance(layer, Linear)][:-1]  # without the head
    alive: list[int] = []
    pack = Linear._pack

    def noted(layer: Linear) -> None:
        alive.append(sum(weight() is not None for weight in weights))
        pack(layer)

    monkeypatch.setattr(Linear, "_pack", noted)
    prepare(model, kernels=False, owned=True)
    assert alive == [8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_weights_that_are_shared_are_not_packed(base: GPT2LMHeadModel) -> None:
    model = build_model(Checkpoint.of(base))
    prepare(model, kernels=False, owned=False)
    theirs = {parameter.data_ptr() for parameter in base.parameters()}
    assert {parameter.data_ptr() for parameter in model.parameters()} == theirs


def test_a_model_config_has_the_same_words_for_every_family() -> None:
    flags: dict[str, Any] = {"scale_attn_by_inverse_layer_idx": True, "n_inner": 24, "eos_token_id": [3, 96, 400]}
    config = ModelConfig.from_hf(random_gpt2(**flags).config)
    shape = (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
    assert shape == (2, 48, 3, 3, 16)
    assert (config.vocab_size, config.max_positions, config.intermediate_size) == (97, 64, 24)
    assert config.attention_scales == (0.25, 0.125) and config.eos_token_ids == (3, 96) and config.tied_head
    assert config.activation == "gelu_new"


def test_a_config_of_another_family_is_refused() -> None:
    from transformers import LlamaConfig

    with pytest.raises(ConfigError, match="is a llama model"):
        ModelConfig.from_hf(LlamaConfig())
