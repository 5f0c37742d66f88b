"""uvicorn inside the running event loop, on a socket that is bound before anything else happens."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from ftb_llm.errors import SetupError

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
async def serve(app: FastAPI, host: str, port: int) -> AsyncIterator[str]:
    """Serve `app` while the block runs; yields the base URL. Port 0 picks a free one. Raises `SetupError` as `check_port` does."""
    listener = _bind(host, port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    server = _Server(
        uvicorn.Config(app, lifespan="off", ws="none", access_log=False, log_config=None, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="control plane")
    listening = asyncio.create_task(server.listening.wait())
    try:
        await asyncio.wait((serving, listening), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving  # raises what stopped it
            raise RuntimeError("the control plane ended before it listened")
        yield url
    finally:
        listening.cancel()
        server.should_exit = True
        await asyncio.wait_for(serving, SHUTDOWN_SECONDS)
        listener.close()


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
