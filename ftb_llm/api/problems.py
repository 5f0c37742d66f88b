"""Errors over HTTP: every one is an `application/problem+json` document (RFC 9457).

Routes raise `Refused` or one of the project's own errors; this module is the boundary that turns them into answers.
"""

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ftb_llm.api.models import Problem
from ftb_llm.errors import FixedSetting, InvalidConfig, NotRecorded, StaleConfig, WrongState

logger = logging.getLogger(__name__)

KINDS: dict[str, tuple[int, str]] = {
    "bad-request": (400, "The request can't be read"),
    "bad-json": (400, "The body is not JSON"),
    "unauthorized": (401, "Bearer token missing or wrong"),
    "cross-origin": (403, "Requests from another web origin are refused"),
    "request-timeout": (408, "The request did not come in time"),
    "fixed-setting": (409, "The setting is fixed for the life of the run"),
    "wrong-state": (409, "The run's present state does not allow this"),
    "stale-config": (412, "The config has changed since it was read"),
    "body-too-large": (413, "The body is too large"),
    "unsupported-media-type": (415, "The body's media type or encoding is not supported"),
    "foreign-host": (421, "The Host header does not name this machine"),
    "invalid-config": (422, "The resulting config is not valid"),
    "invalid-request": (422, "The request is not valid"),
    "precondition-required": (428, "If-Match is required"),
    "header-too-large": (431, "The request's header is too large"),
    "internal-error": (500, "Internal error"),
    "not-ready": (503, "The run makes no progress"),
    "not-recorded": (503, "The change could not be written down and did not happen"),
    "disk-full": (507, "The run's disk is full, so the change did not happen"),
}


class Refused(Exception):
    """A request that can't be served; `kind` is a key of `KINDS`."""

    def __init__(self, kind: str, detail: str, *, headers: Mapping[str, str] | None = None, **extra: Any) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail
        self.headers = headers
        self.extra = extra

    def response(self, scope: Scope) -> Response:
        status, title = KINDS[self.kind]
        return _response(scope, status, f"urn:ftb-llm:problem:{self.kind}", title, self.detail, self.headers, self.extra)


class LastResort:
    """Outermost middleware: what nobody expected becomes a 500 that hides the internals and logs them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except ClientDisconnect:
            logger.info("client left before %s %s was answered", scope["method"], scope["path"])
        except Exception:
            if scope["type"] != "http" or started:
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await Refused("internal-error", "see the run's log for the cause").response(scope)(scope, receive, send)


def document(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that may answer with these problems."""
    statuses = sorted({KINDS[kind][0] for kind in kinds})
    return {status: {"model": Problem, "description": "; ".join(KINDS[kind][1] for kind in kinds if KINDS[kind][0] == status)} for status in statuses}


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem document."""
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(StaleConfig, _stale_config)
    app.add_exception_handler(FixedSetting, _fixed_setting)
    app.add_exception_handler(InvalidConfig, _invalid_config)
    app.add_exception_handler(WrongState, _wrong_state)
    app.add_exception_handler(NotRecorded, _not_recorded)
    app.add_middleware(LastResort)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response(request.scope)


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    detail = f"{request.method} {request.url.path}: {error.detail}"
    headers = {"Allow": ", ".join(_allowed(request))} if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED else error.headers
    return _response(request.scope, error.status_code, "about:blank", phrase, detail, headers, {})


def _allowed(request: Request) -> list[str]:
    """The methods of all routes of this path; the error knows those of one."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in routes for method in route.methods}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [{"path": ".".join(str(part) for part in item["loc"]), "message": item["msg"]} for item in error.errors()]
    detail = "; ".join(f"{item['path']}: {item['message']}" for item in errors)
    return Refused("invalid-request", detail, errors=errors).response(request.scope)


def _stale_config(request: Request, error: Exception) -> Response:
    assert isinstance(error, StaleConfig)
    return Refused("stale-config", str(error), headers={"ETag": error.current}, current_etag=error.current).response(request.scope)


def _fixed_setting(request: Request, error: Exception) -> Response:
    assert isinstance(error, FixedSetting)
    errors = [{"path": key, "message": "fixed for the life of the run"} for key in error.keys]
    return Refused("fixed-setting", str(error), errors=errors).response(request.scope)


def _invalid_config(request: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidConfig)
    errors = [{"path": problem.key, "message": problem.message} for problem in error.problems]
    return Refused("invalid-config", str(error), errors=errors).response(request.scope)


def _wrong_state(request: Request, error: Exception) -> Response:
    return Refused("wrong-state", str(error)).response(request.scope)


def _not_recorded(request: Request, error: Exception) -> Response:
    assert isinstance(error, NotRecorded)
    return Refused("disk-full" if error.full else "not-recorded", str(error)).response(request.scope)


def _response(scope: Scope, status: int, kind: str, title: str, detail: str, headers: Mapping[str, str] | None, extra: dict[str, Any]) -> Response:
    body = {"type": kind, "title": title, "status": status, "detail": detail, "instance": quote(scope["path"]), **extra}
    # ASCII JSON: what a client sent is quoted back, and may hold text that UTF-8 can't carry.
    return Response(json.dumps(body), status, dict(headers or {}), "application/problem+json")
