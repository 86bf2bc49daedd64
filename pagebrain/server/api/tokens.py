"""The small routes: models, health and version, and the tokenizer."""

import sys
from array import array

from fastapi import APIRouter
from starlette.responses import Response

import pagebrain
from pagebrain.engine.requests import NO_TOKENIZER
from pagebrain.server.api.body import JsonRoute
from pagebrain.server.api.documented import documented
from pagebrain.server.api.heavy import json_pieces
from pagebrain.server.api.protocol import DetokenizeRequest, TokenizeRequest
from pagebrain.server.api.responses import Detokenized, Health, ModelCard, ModelList, Tokenized, Version
from pagebrain.server.api.service import Service
from pagebrain.server.api.whole import JsonAnswer
from pagebrain.server.error_responses import ApiError, bad_request, json_response
from pagebrain.server.paths import plain_path

MAX_SILENCE_S = 60.0
"""A working engine sends a message after every step. The longest step by default, 512 tokens of GPT-2 XL, takes about 1.6e12
operations: half a minute on a CPU with 5e10 operations a second."""


def model_routes(service: Service) -> APIRouter:
    """``/v1/models``, ``/health`` and ``/version``."""
    router = APIRouter(route_class=JsonRoute)

    def card() -> ModelCard:
        config = service.client.config
        assert config.max_model_len is not None and config.vocab_size is not None
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.started,
            "owned_by": "pagebrain",
            "max_model_len": config.max_model_len,
            "vocab_size": config.vocab_size,
        }

    @router.get("/v1/models", **documented(ModelList))
    async def list_models() -> Response:
        """The served model."""
        models: ModelList = {"object": "list", "data": [card()]}
        return json_response(models)

    @router.get("/v1/models/{model:path}", **documented(ModelCard, 404))
    async def retrieve_model(model: str) -> Response:
        """The served model, by its name. A name with slashes is a part of the path."""
        if model != plain_path(service.model_name).removeprefix("/"):
            service.check_model(model)
        return json_response(card())

    @router.get("/health", **documented(Health, 503))
    async def health() -> Response:
        """Whether requests are accepted, and the engine makes progress."""
        client = service.client
        if not client.is_alive:
            raise ApiError(503, f"the engine has stopped: {client.failure}", code="engine_dead")
        if client.is_draining:
            raise ApiError(503, "the server is shutting down", code="server_shutting_down")
        if client.silent_s > MAX_SILENCE_S:
            message = f"requests are under way, and the engine has sent nothing for {client.silent_s:.0f} seconds"
            raise ApiError(503, message, code="engine_silent")
        healthy: Health = {"status": "ok"}
        return json_response(healthy)

    @router.get("/version", **documented(Version))
    async def version() -> Response:
        """PageBrain's version."""
        own: Version = {"version": pagebrain.__version__}
        return json_response(own)

    return router


def token_routes(service: Service) -> APIRouter:
    """``/tokenize`` and ``/detokenize``."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/tokenize", **documented(Tokenized, 400, 404))
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a text, or of a chat as the chat template writes it."""
        service.check_model(body.model)
        add_special_tokens = body.add_special_tokens
        if add_special_tokens is None:
            add_special_tokens = not body.wants_chat
        text = await service.prompts.chat_prompt(body.messages) if body.wants_chat else body.prompt
        tokens = array("i", await service.prompts.text_ids(text, add_special_tokens))
        hold = service.held.hold(tokens.itemsize * len(tokens))
        max_model_len = service.client.config.max_model_len
        return JsonAnswer(json_pieces({"tokens": tokens, "count": len(tokens), "max_model_len": max_model_len}), hold)

    @router.post("/detokenize", **documented(Detokenized, 400, 404))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        service.check_model(body.model)
        detokenizer, vocab_size = service.client.detokenizer, service.client.config.vocab_size
        assert vocab_size is not None
        if detokenizer is None:
            raise bad_request(f"tokens have no text: {NO_TOKENIZER}", "tokens")
        num_ids = max(vocab_size, detokenizer.num_ids)  # a tokenizer may have more tokens than the model
        for index, token_id in enumerate(body.tokens):
            if token_id >= num_ids:
                raise bad_request(f"tokens[{index}] is {token_id}, but ids run from 0 to {num_ids - 1}", "tokens")
        text = detokenizer.decode(body.tokens, skip_special_tokens=False)
        return JsonAnswer(json_pieces({"prompt": text}), service.held.hold(sys.getsizeof(text)))

    return router
