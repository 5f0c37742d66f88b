"""The FastAPI application, put together. A further endpoint is one more router module in `ROUTERS`."""

from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from ftb_llm import __version__
from ftb_llm.api import problems
from ftb_llm.api.guard import OPEN_PATHS, Guard
from ftb_llm.api.port import RunPort
from ftb_llm.api.routes import config, control, docs, health, root, status
from ftb_llm.api.settings_schema import settings_schema
from ftb_llm.api.token import cleaned
from ftb_llm.errors import ConfigError

ROUTERS = (root.router, health.router, status.router, config.router, control.router, docs.router)
_ANYWHERE = ("bad-request", "request-timeout", "header-too-large", "internal-error")
_PROBLEM = {"$ref": "#/components/schemas/Problem"}


def create_app(run: RunPort, *, token: str | None = None) -> FastAPI:
    """The control plane of one run. Without a token it only serves clients on this machine."""
    token = None if token is None else cleaned(token)
    if token == "":
        raise ConfigError("control.token_env", "the variable holds an empty token; put the bearer token into it")
    app = ControlPlane(
        title="ftb_llm control plane",
        description="Reports on the live run and reconfigures it. Every error is application/problem+json.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=problems.document(*_ANYWHERE, *(["cross-origin", "foreign-host"] if token is None else ["unauthorized"])),
    )
    app.state.run = run
    app.state.needs_token = token is not None
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Guard, token=token)
    app.add_middleware(HeadLikeGet)
    problems.install(app)  # last, so that its middleware is the outermost
    return app


class HeadLikeGet:
    """Middleware: a HEAD is routed as the GET that it asks about. The server, which knows better, sends no body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self.app({**scope, "method": "GET"} if is_head else scope, receive, send)


class ControlPlane(FastAPI):
    """FastAPI, with an OpenAPI document that tells the truth about errors and the token."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            components = schema["components"]
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    _correct_problems(operation["responses"])
                    if path in OPEN_PATHS:
                        operation["security"] = []
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            components["schemas"]["ConfigPatch"] = {name: value for name, value in settings_schema().items() if name != "$schema"}
            if self.state.needs_token:
                components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"bearer": []}]
        assert self.openapi_schema is not None
        return self.openapi_schema


def _correct_problems(responses: dict[str, Any]) -> None:
    """FastAPI describes every answer as application/json, and request errors in a shape that we don't send."""
    for code, response in responses.items():
        if int(code) < 400:
            continue
        response["content"] = {"application/problem+json": {"schema": _PROBLEM}}
        if response["description"] == "Validation Error":
            response["description"] = problems.KINDS["invalid-request"][1]
