"""An honest client of a control plane: what it asked, how long it waited, and what failed."""

import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from ftb_llm.api.client import Client
from ftb_llm.errors import FtbError

EVERY_SECONDS = 0.25
PATCH_EVERY = 12  # rounds
TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request and its answer."""

    what: str
    at: float
    seconds: float
    problem: str | None = None


class HonestClient:
    """Asks in a thread of its own: `/healthz` on a new connection, the status on a kept one, and now and then a change of beta."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.asked: list[Asked] = []
        self._url, self._token = url, token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask_on, name="honest client")

    def __enter__(self) -> "HonestClient":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask_on(self) -> None:
        count = 0
        with Client(self._url, self._token) as client:
            while not self._stop.wait(EVERY_SECONDS):
                self._ask("GET /healthz", self._health)
                self._ask("GET /v1/status", client.status)
                count += 1
                if count % PATCH_EVERY == 0:
                    beta = 0.5 + count / PATCH_EVERY % 2 / 100
                    self._ask("PATCH /v1/config", partial(client.patch, {"objective": {"beta": beta}}))

    def _health(self) -> None:
        connection = http.client.HTTPConnection(urlsplit(self._url).netloc, timeout=TIMEOUT_SECONDS)
        try:
            connection.request("GET", "/healthz")
            status = connection.getresponse().status
        finally:
            connection.close()
        if status != 200:
            raise FtbError(f"answered {status}")

    def _ask(self, what: str, ask: Callable[[], object]) -> None:
        at, problem = time.time(), None
        try:
            ask()
        except (OSError, http.client.HTTPException, FtbError) as error:
            problem = f"{type(error).__name__}: {error}"
        self.asked.append(Asked(what=what, at=at, seconds=time.time() - at, problem=problem))
