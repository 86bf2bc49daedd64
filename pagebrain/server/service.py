"""What all routes share: the engine's client, what the model is called, and the way a request gets into the engine."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagebrain.outputs import OutputDelta
from pagebrain.sampling_params import SamplingParams
from pagebrain.server.client import EngineClient
from pagebrain.server.errors import ApiError
from pagebrain.server.logprobs import TokenTexts
from pagebrain.server.options import ServerOptions
from pagebrain.server.prompts import PromptReader
from pagebrain.server.responses import Usage
from pagebrain.server.streams import DrainingError, RequestStream


@dataclass
class Service:
    """One model, served.

    Attributes:
        prompts: makes token ids of what requests hold.
        texts: what single tokens look like.
        started: unix seconds.
    """

    client: EngineClient
    options: ServerOptions
    prompts: PromptReader = field(init=False)
    texts: TokenTexts = field(init=False)
    started: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = PromptReader(self.client, self.options.chat_template)
        self.texts = TokenTexts(self.client.detokenizer)
        self.started = int(time.time())

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.options.served_model_name

    def check_model(self, name: str | None) -> None:
        """Raise ``ApiError`` with status 404 if ``name`` is given and another model's."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {name[:80]!r} does not exist here; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, answer_id: str, user: str | None = None
    ) -> list[RequestStream]:
        """Hand all prompts to the engine, or none. Raises what :meth:`EngineClient.submit_all` raises."""
        ids = [answer_id] if len(prompts) == 1 else [f"{answer_id}-{index}" for index in range(len(prompts))]
        streams = self.client.submit_all([(prompt, params, request_id) for prompt, request_id in zip(prompts, ids)])
        for stream in streams:
            stream.user = user
        return streams


@dataclass(frozen=True)
class Heading:
    """What stands at the top of an answer, and of every event of a streamed one."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> "Heading":
        """For an answer that begins now."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)

    def event_start(self, kind: str) -> str:
        """An event up to the value of ``choices``, made once for a stream."""
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return f"data: {json.dumps(fields)[:-1]}, " + '"choices": '


def usage(streams: Sequence[RequestStream], only_prompts: bool = False) -> Usage:
    """The tokens of a request's prompts and, unless the client gets ``only_prompts`` back, of the answers to them."""
    prompt_tokens = sum(stream.num_prompt_tokens for stream in streams)
    completion_tokens = 0 if only_prompts else sum(stream.num_generated for stream in streams)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def check_complete(answers: list[list[OutputDelta]]) -> None:
    """Raise ``DrainingError`` if the server's end cut an answer short: nobody should take it for a whole one."""
    if any(delta.finish_reason == "abort" for deltas in answers for delta in deltas):
        raise DrainingError("the server shut down before the answer was complete")
