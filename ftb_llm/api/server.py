"""uvicorn inside the running event loop, on a socket that is bound before anything else happens."""

import asyncio
import errno
import functools
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from ftb_llm.api.connection import BoundedProtocol, Limits
from ftb_llm.errors import SetupError

logger = logging.getLogger(__name__)

WAITING_CONNECTIONS = 1024  # that the system holds until they are accepted
OUT_OF_HANDLES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
WARNING_EVERY_SECONDS = 60.0
GRACE_SECONDS = 2  # for requests in progress, before they are cut off
SHUTDOWN_SECONDS = 10.0  # for everything; longer is a bug


class _Server(uvicorn.Server):
    """uvicorn, which leaves the process's signals to its owner and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve(app: FastAPI, host: str, port: int, *, limits: Limits | None = None) -> AsyncIterator[str]:
    """Serve `app` while the block runs; yields the base URL. Port 0 picks a free one. Raises `SetupError` as `check_port` does."""
    listener = _bind(host, port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    server = _Server(_uvicorn_config(app, limits or Limits()))
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="control plane")
    listening = asyncio.create_task(server.listening.wait())
    try:
        await asyncio.wait((serving, listening), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving  # raises what stopped it
            raise RuntimeError("the control plane ended before it listened")
        listener.listen(WAITING_CONNECTIONS)
        with _accepting_calmly():
            yield url
    finally:
        listening.cancel()
        server.should_exit = True
        await asyncio.wait_for(serving, SHUTDOWN_SECONDS)
        listener.close()


def _uvicorn_config(app: FastAPI, limits: Limits) -> uvicorn.Config:
    """`log_level` error: what a client does wrong is a warning to uvicorn, and nothing that the one who trains should see."""
    return uvicorn.Config(
        app,
        http=functools.partial(BoundedProtocol, limits=limits),  # type: ignore[arg-type]  # called like the class
        backlog=1,  # asyncio accepts so many at once, before it closes any of those that make room for them
        timeout_keep_alive=int(limits.idle_seconds) + 1,  # `Limits` is the one that holds
        lifespan="off",
        ws="none",
        access_log=False,
        log_config=None,
        log_level="error",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


@contextmanager
def _accepting_calmly() -> Iterator[None]:
    """One line a minute, instead of a traceback a second, while the process has no file handle left for a connection; asyncio goes on trying."""
    loop = asyncio.get_running_loop()
    before: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object] | None = loop.get_exception_handler()
    last_warning = -WARNING_EVERY_SECONDS

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal last_warning
        error = context.get("exception")
        if not ("socket" in context and isinstance(error, OSError) and error.errno in OUT_OF_HANDLES):
            before(loop, context) if before is not None else loop.default_exception_handler(context)
        elif time.monotonic() - last_warning >= WARNING_EVERY_SECONDS:
            last_warning = time.monotonic()
            logger.warning("the control plane accepts no connection at the moment: %s", error.strerror)

    loop.set_exception_handler(handle)
    try:
        yield
    finally:
        loop.set_exception_handler(before)


def check_port(host: str, port: int) -> None:
    """Raise `SetupError` when the control plane could not listen there."""
    _bind(host, port).close()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:  # the second for names that no resolver would be asked for
        raise SetupError(f"control.host: {host} can't be resolved: {error}; use an address of this machine, for example 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise SetupError(_explain(error, host, port)) from None
    return listener


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"control.port: {port} is in use; end the program that holds it, or choose another with control.port={port + 1 if port < 65535 else port - 1}"
    if error.errno == errno.EACCES:
        return f"control.port: {port} needs special rights; choose one above 1023, for example control.port=8000"
    return f"control.host: can't listen on {host} port {port}: {error.strerror}; use an address of this machine, for example 127.0.0.1"
