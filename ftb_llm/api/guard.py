"""Who may talk to the control plane.

With a token, every route but `/healthz` needs it. Without one the server listens on loopback only, where the danger is a
web page in the user's own browser: it can reach this port under a name of its own (DNS rebinding), or post to it from
another origin. So the Host header must name this machine, a write must not come from elsewhere, and of what browsers mark
as another site's only a link that was followed is answered.
"""

import hmac
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ftb_llm.api.loopback import is_loopback
from ftb_llm.api.problems import Refused

OPEN_PATHS = ("/healthz",)
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?")  # nothing that a client could take for a user or a fragment


class Guard:
    """Middleware that refuses what must not come in. The token is compared in constant time and never logged."""

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self.app = app
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await refusal.response(scope)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        if self._token is not None:
            if scope["path"] in OPEN_PATHS or _has_token(headers, self._token):
                return None
            return Refused("unauthorized", "send the header Authorization: Bearer <token>", headers={"WWW-Authenticate": "Bearer"})
        host = headers.get("host", "")
        if not is_loopback(_hostname(host)):
            return Refused("foreign-host", f"Host {host!r} is not this machine; use http://127.0.0.1 or http://localhost")
        origin = headers.get("origin")
        if scope["method"] not in SAFE_METHODS and origin is not None and origin != f"http://{host}":
            return Refused("cross-origin", f"Origin {origin!r} is not http://{host}")
        followed_link = scope["method"] in SAFE_METHODS and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site") == "cross-site" and not followed_link:
            return Refused("cross-origin", "Sec-Fetch-Site is cross-site: a web page of another site sent this")
        return None


def _has_token(headers: Headers, token: bytes) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return hmac.compare_digest(given.strip().encode("latin-1"), token) and scheme.lower() == "bearer"


def _hostname(host: str) -> str:
    """The name or address in a Host header, or "" when that holds anything else."""
    match = HOST.fullmatch(host)
    return match[1].strip("[]") if match else ""
