"""Builds the web application: the API's routes, error handlers, guards, metrics and the live page."""

from typing import Any

from fastapi import FastAPI

import pagebrain
from pagebrain.server.api.chat import chat_routes
from pagebrain.server.api.completions import completion_routes
from pagebrain.server.api.documented import add_guards_answers, name_the_model
from pagebrain.server.api.metrics import ServerMetrics, metrics_route
from pagebrain.server.api.plain_generate import generate_routes
from pagebrain.server.api.request_log import RequestLog
from pagebrain.server.api.service import Service
from pagebrain.server.api.tokens import model_routes, token_routes
from pagebrain.server.error_responses import add_error_handlers
from pagebrain.server.guards.requests_guard import add_guards, needs_host_check
from pagebrain.server.link.client import EngineClient
from pagebrain.server.live.routes import live_router
from pagebrain.server.options import ServerOptions


class PageBrainApp(FastAPI):
    """FastAPI with an OpenAPI schema that lists exactly the answers of this API."""

    server_options = ServerOptions()

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI schema. An invalid request is answered with status 400, as by OpenAI, and not with FastAPI's 422."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            options = self.server_options
            add_guards_answers(schema, options.api_key is not None, needs_host_check(options))
            name_the_model(schema, options.served_model_name)
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(client: EngineClient, options: ServerOptions) -> FastAPI:
    """The application. ``client`` must have started."""
    app = PageBrainApp(
        title="PageBrain",
        description="An OpenAI-compatible server for GPT-2 on paged attention.",
        version=pagebrain.__version__,
        docs_url=None,  # FastAPI's two documentation pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
    )
    app.server_options = options
    service = Service(client, options)
    for routes in (completion_routes, chat_routes, generate_routes, token_routes, model_routes):
        app.include_router(routes(service))
    metrics = ServerMetrics(options.served_model_name, held_bytes=lambda: service.held.num_bytes)
    client.observers.append(metrics)
    if options.log_requests:
        client.observers.append(RequestLog())
    app.include_router(metrics_route(metrics))
    app.include_router(live_router(client, options))
    add_error_handlers(app)
    add_guards(app, options)
    return app
