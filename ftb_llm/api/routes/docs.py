"""The OpenAPI document as one plain page: no script, nothing loaded from elsewhere, so that it opens offline."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733; background: #fff; }
h2 { margin: 2.5rem 0 .2rem; font-size: 1.1rem; border-top: 1px solid #d8dee6; padding-top: 1rem; }
h2 b { display: inline-block; min-width: 4.2rem; color: #0a5fb4; }
code, pre { font: 14px/1.45 ui-monospace, monospace; background: #f2f5f8; border-radius: 4px; }
code { padding: .1rem .3rem; } pre { padding: .7rem; overflow-x: auto; }
table { border-collapse: collapse; } td { padding: .15rem .8rem .15rem 0; vertical-align: top; }
@media (prefers-color-scheme: dark) {
  body { color: #dbe3ec; background: #14191f; }
  code, pre { background: #202833; }
  h2 b { color: #6db3f2; } h2 { border-color: #333f4d; }
}
"""


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> HTMLResponse:
    page = render(request.app.openapi())
    return HTMLResponse(page, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


def render(openapi: dict[str, Any]) -> str:
    """The whole page."""
    info = openapi["info"]
    operations = ((path, method, operation) for path, methods in openapi["paths"].items() for method, operation in methods.items())
    sections = "".join(part for path, method, operation in operations for part in _operation(path, method, operation))
    schemas = "".join(_schema(name, schema) for name, schema in openapi["components"]["schemas"].items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(info["title"])}</title>'
        f"<style>{_STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])} "
        f'The same as <a href="/openapi.json">OpenAPI</a>.</p>{sections}<h2>Documents</h2>{schemas}</html>'
    )


def _operation(path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"<h2><b>{method.upper()}</b> <code>{escape(path)}</code> {escape(operation['summary'])}</h2><p>{escape(operation.get('description', ''))}</p>"
    for parameter in operation.get("parameters", []):
        yield f"<p>{escape(parameter['in'])} <code>{escape(parameter['name'])}</code> {escape(parameter.get('description', ''))}</p>"
    for media in list(operation.get("requestBody", {}).get("content", {}).values())[:1]:
        yield f"<p>body, for example</p><pre>{escape(json.dumps(media.get('example', {})))}</pre>"
    yield "<table>"
    for status, response in sorted(operation["responses"].items()):
        yield f"<tr><td><code>{escape(status)}</code><td>{escape(response['description'])}<td>{_linked(response)}"
    yield "</table>"


def _linked(response: dict[str, Any]) -> str:
    """The name of the document that is answered, linked to its description."""
    names = [media.get("schema", {}).get("$ref", "").rpartition("/")[2] for media in response.get("content", {}).values()]
    return " ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in names if name)


def _schema(name: str, schema: dict[str, Any]) -> str:
    summary = f"<summary><code>{escape(name)}</code> {escape(schema.get('description', ''))}</summary>"
    return f'<details id="{escape(name)}">{summary}<pre>{escape(json.dumps(schema, indent=2))}</pre></details>'
