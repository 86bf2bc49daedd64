"""Fields that this API does not implement, and the values of them that have no effect.

Clients send the defaults of other APIs explicitly. Such a value is accepted, because the answer is the same without it.
Any other value of such a field would change the answer, and is refused.
"""

import json
from typing import Any

from pydantic import JsonValue

DEFAULTS: dict[str, tuple[JsonValue, ...]] = {
    # OpenAI
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_obfuscation": (False,),  # in stream_options
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    # in the messages of a chat
    "annotations": ([],),
    "tool_calls": ([],),
    # vLLM
    "add_generation_prompt": (True,),
    "bad_words": ([],),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "echo": (False,),  # of a chat
    "kv_transfer_params": ({},),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    # SGLang
    "custom_params": ({},),
    "no_stop_trim": (False,),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_meta_info": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "session_params": ({},),
    "use_audio_in_video": (False,),
    # samplers of other servers, switched off
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "typical_p": (1,),
}
"""Field name -> values that have no effect."""


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether the value of a field that is not implemented has no effect: ``null``, or one of its :data:`DEFAULTS`."""
    if value is None:
        return True
    is_bool = isinstance(value, bool)
    return any(value == default and is_bool == isinstance(default, bool) for default in DEFAULTS.get(name, ()))


def describe_defaults(schema: dict[str, Any]) -> None:
    """Add these fields and their allowed values to the JSON schema of a request, except fields that the schema defines."""
    names_of: dict[str, list[str]] = {}
    for name, values in DEFAULTS.items():
        if name not in schema["properties"]:
            names_of.setdefault(json.dumps([*values, None]), []).append(name)
    schema["patternProperties"] = {f"^({'|'.join(names)})$": {"enum": json.loads(text)} for text, names in names_of.items()}
