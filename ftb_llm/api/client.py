"""A small client of the control plane, for the CLI and for scripts."""

from types import TracebackType
from typing import Any, Self

import httpx

from ftb_llm import __version__
from ftb_llm.api.loopback import is_loopback
from ftb_llm.errors import ApiError, ApiUnreachable

TIMEOUT_SECONDS = 30.0


class Client:
    """Raises `ApiUnreachable` when nothing usable answers, and `ApiError` with the problem's detail when a request is refused."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"User-Agent": f"ftb-llm/{__version__}"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        try:
            # A proxy set in the environment is never the way to this machine itself.
            through_proxy = not is_loopback(httpx.URL(self.url).host)
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_SECONDS, trust_env=through_proxy)
        except httpx.InvalidURL as error:
            raise ApiUnreachable(f"{url} is not a URL such as http://127.0.0.1:8000: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def status(self) -> dict[str, Any]:
        return self._document("GET", "/v1/status")

    def config(self) -> dict[str, Any]:
        """`{"version": ..., "config": {...}}`"""
        return self._document("GET", "/v1/config")

    def history(self, *, since: int = 0) -> list[dict[str, Any]]:
        """All versions above `since`, oldest first; as many requests as the server wants."""
        versions: list[dict[str, Any]] = []
        after: int | None = since
        while after is not None:
            page = self._document("GET", "/v1/config/history", params={"since": after, "limit": 1000})
            versions += page["versions"]
            after = page["next"]
        return versions

    def patch(self, patch: dict[str, Any]) -> dict[str, Any]:
        """Apply a merge patch to the newest version; when another one gets in between, read again and retry once."""
        try:
            return self._patch(patch)
        except ApiError as error:
            if error.status != 412:
                raise
            return self._patch(patch)

    def stop(self) -> dict[str, Any]:
        return self._document("POST", "/v1/control/stop")

    def checkpoint(self) -> dict[str, Any]:
        return self._document("POST", "/v1/control/checkpoint")

    def ready(self) -> bool:
        return self.not_ready_cause() is None

    def not_ready_cause(self) -> str | None:
        """Why the run makes no progress, or None when it does."""
        try:
            self._document("GET", "/readyz")
        except ApiError as error:
            if error.status != 503:
                raise
            return error.detail
        return None

    def _patch(self, patch: dict[str, Any]) -> dict[str, Any]:
        etag = self._send("GET", "/v1/config").headers["ETag"]
        headers = {"If-Match": etag, "Content-Type": "application/merge-patch+json"}
        return self._document("PATCH", "/v1/config", json=patch, headers=headers)

    def _document(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        document: dict[str, Any] = self._send(method, path, **request).json()
        return document

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **request)
        except httpx.ConnectError:
            raise ApiUnreachable(f"nothing listens at {self.url}; is the run alive, and is this its control.port?") from None
        except httpx.TimeoutException:
            raise ApiUnreachable(f"{self.url} did not answer within {TIMEOUT_SECONDS:.0f} s") from None
        except httpx.HTTPError as error:
            raise ApiUnreachable(f"{self.url}: {error}") from None
        media_type = response.headers.get("content-type", "").partition(";")[0]
        if response.is_success and media_type == "application/json":
            return response
        if media_type == "application/problem+json":
            problem = response.json()
            raise ApiError(response.status_code, problem["type"].rpartition(":")[2], problem["detail"])
        raise ApiUnreachable(f"{self.url} is not an ftb_llm control plane: {method} {path} answered {response.status_code} {media_type}")
