"""A small package index on loopback, which counts what it gives away.

It speaks what pip reads of an index: a page of links per project, and each wheel's metadata beside it. A wheel may be listed
without being there: what only asks for its metadata never notices, and what asks for the wheel is counted and gets a 404.
"""

import hashlib
import html
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(slots=True, frozen=True, kw_only=True)
class Listed:
    """A file of an index: its name, its metadata where it is a wheel, and its content where it is there."""

    name: str
    metadata: bytes | None
    content: Path | None

    @classmethod
    def from_file(cls, path: Path) -> "Listed":
        return cls(name=path.name, metadata=wheel_metadata(path), content=path)


@dataclass(slots=True, frozen=True, kw_only=True)
class Fetched:
    """A file that was asked for, and how many bytes went out."""

    path: str
    bytes: int


@dataclass(slots=True, kw_only=True)
class Index:
    """Files by shelf (`simple`, `whl/cpu`) and project, and what was asked of them."""

    shelves: dict[str, dict[str, list[Listed]]]
    url: str = ""
    pages: list[str] = field(default_factory=list)
    fetched: list[Fetched] = field(default_factory=list)

    def page(self, shelf: str, project: str) -> str | None:
        """The page of links of a project; None where the shelf doesn't have it."""
        listed = self.shelves.get(shelf, {}).get(project)
        if listed is None:
            return None
        return "<!DOCTYPE html><html><body>" + "".join(_link(shelf, project, file) for file in listed) + "</body></html>"

    def find(self, path: str) -> Listed | None:
        folder, _, name = path.strip("/").rpartition("/")
        shelf, _, project = folder.rpartition("/")
        return next((file for file in self.shelves.get(shelf, {}).get(project, []) if file.name == name), None)


def wheel_metadata(path: Path) -> bytes | None:
    """What a wheel says of itself; None for anything else."""
    if path.suffix != ".whl":
        return None
    with zipfile.ZipFile(path) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1]
        return wheel.read(name)


def _link(shelf: str, project: str, file: Listed) -> str:
    told = "" if file.metadata is None else f' data-core-metadata="sha256={hashlib.sha256(file.metadata).hexdigest()}"'
    return f'<a href="/{shelf}/{project}/{file.name.replace("+", "%2B")}"{told}>{html.escape(file.name)}</a><br>'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    index: Index

    def do_GET(self) -> None:
        path = self.path.replace("%2B", "+")
        if path.endswith("/"):
            shelf, _, project = path.strip("/").rpartition("/")
            self.index.pages.append(path)
            page = self.index.page(shelf, project)
            self._answer(None if page is None else page.encode(), "text/html")
        elif path.endswith(".metadata"):
            file = self.index.find(path.removesuffix(".metadata"))
            self._answer(file.metadata if file else None, "application/octet-stream")
        else:
            file = self.index.find(path)
            content = file.content.read_bytes() if file and file.content else None
            self.index.fetched.append(Fetched(path=path, bytes=len(content or b"")))
            self._answer(content, "application/octet-stream")

    def _answer(self, body: bytes | None, media_type: str) -> None:
        self.send_response(HTTPStatus.NOT_FOUND if body is None else HTTPStatus.OK)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: what was asked for stands in the index."""


@contextmanager
def serving(index: Index) -> Iterator[Index]:
    """The index, with its address, while it answers on a free port of loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"index": index}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    index.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
