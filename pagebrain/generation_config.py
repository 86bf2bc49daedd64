"""A checkpoint's generation settings, from ``generation_config.json`` or, in old checkpoints, from ``config.json``.

Hugging Face's ``generate`` uses all of them as defaults. PageBrain uses the end tokens only. One notice names the other
settings that would change an answer: those that a request can set, and those that are not supported.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

_IN_REQUESTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "do_sample": ("temperature 0", (True,)),
    "temperature": ("temperature", (1,)),
    "top_k": ("top_k", (0,)),
    "top_p": ("top_p", (1,)),
    "min_p": ("min_p", (0,)),
    "repetition_penalty": ("repetition_penalty", (1,)),
    "max_new_tokens": ("max_tokens", ()),
    "max_length": ("max_tokens", (20,)),
    "min_new_tokens": ("min_tokens", (0,)),
    "min_length": ("min_tokens", (0,)),
    "stop_strings": ("stop", ()),
    "num_return_sequences": ("n", (1,)),
    "suppress_tokens": ("logit_bias of -100", ()),
}
"""Hugging Face's setting -> the request's parameter for it, and the values that have no effect."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
"""Settings that would change an answer and that no request can set, with the values that have no effect."""


def read_settings(saved: dict[str, Any], ends: Any, notices: list[str]) -> "GenerationConfig":
    """A checkpoint's settings as Hugging Face's ``GenerationConfig``.

    Args:
        saved: the JSON of ``generation_config.json``, or of ``config.json`` where there is no such file.
        ends: the end tokens of ``config.json``.
        notices: gets a line if Hugging Face's class refuses the settings. Their end tokens are used in any case.
    """
    from transformers import GenerationConfig

    all_ends = [*_flat(saved.get("eos_token_id")), *_flat(ends)]
    known = {name: saved[name] for name in (*_IN_REQUESTS, *_UNSUPPORTED, "bos_token_id", "pad_token_id") if name in saved}
    try:
        return GenerationConfig(**known, eos_token_id=all_ends or None)  # type: ignore[no-untyped-call]
    except Exception as error:
        reason = " ".join(str(error).split())
        notices.append(f"the model's generation settings are left out, except its end tokens: {reason}")
        return GenerationConfig(eos_token_id=all_ends or None)  # type: ignore[no-untyped-call]


def end_tokens(hf_config: Any, generation_config: Any) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """``(ids, others)``: the end tokens that the two files name, and the values there that are no ids of the vocabulary.

    Whole floats and nested lists are accepted, as in Hugging Face.
    """
    ids: dict[int, None] = {}
    others: list[Any] = []
    for source in (hf_config, generation_config):
        for value in _flat(getattr(source, "eos_token_id", None)):
            token_id = int(value) if isinstance(value, float) and value.is_integer() else value
            if type(token_id) is int and 0 <= token_id < hf_config.vocab_size:
                ids[token_id] = None
            elif value not in others:
                others.append(value)
    return tuple(ids), tuple(others)


def generation_notices(model: Any) -> list[str]:
    """Lines for users: end tokens that are left out, and settings that do not apply by themselves.

    ``model`` has the attributes ``config`` and ``generation_config``, as a Hugging Face model does.
    """
    notices = []
    hf_config, generation_config = model.config, getattr(model, "generation_config", None)
    _, others = end_tokens(hf_config, generation_config)
    if others:
        named = ", ".join(map(repr, others))
        notices.append(f"end tokens of the model that are no ids from 0 to {hf_config.vocab_size - 1} are left out: {named}")
    in_requests = [
        f"{name}={_short(value)}{'' if field == name else f' (as {field})'}"
        for name, (field, idle) in _IN_REQUESTS.items()
        if _asks(value := getattr(generation_config, name, None), idle, name)
    ]
    unsupported = [name for name, idle in _UNSUPPORTED.items() if _asks(getattr(generation_config, name, None), idle, name)]
    parts = []
    if in_requests:
        parts.append(f"a request has to ask for {', '.join(in_requests)}")
    if unsupported:
        parts.append(f"{', '.join(unsupported)} {'is' if len(unsupported) == 1 else 'are'} not supported")
    if parts:
        notices.append(f"the model's generation settings do not apply by themselves: {'; '.join(parts)}")
    return notices


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif value is not None:
        yield value


def _asks(value: Any, idle: tuple[Any, ...], name: str) -> bool:
    if value is None or value in ([], {}, ""):
        return False
    return name == "do_sample" and value is False or (name != "do_sample" and value not in idle)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
