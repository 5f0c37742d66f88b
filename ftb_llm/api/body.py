"""Reading a JSON body that nobody has checked yet."""

import json
from typing import Any

from starlette.requests import Request

from ftb_llm.api.problems import Refused

MAX_BODY_BYTES = 64 * 1024
JSON_TYPES = ("application/merge-patch+json", "application/json")
# `curl -d` labels every body as a form unless told otherwise, so that label means JSON here; so does none at all.
_TAKEN_FOR_JSON = ("", *JSON_TYPES, "application/x-www-form-urlencoded")


async def read_json(request: Request) -> Any:
    """The body as JSON; raises `Refused` for a wrong media type, a body that is too large, or broken JSON."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Refused(
            "unsupported-media-type", f"Content-Encoding {encoding} is not supported; send the body as it is", headers={"Accept-Encoding": "identity"}
        )
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in _TAKEN_FOR_JSON:
        detail = f"{media_type} is not supported; send {' or '.join(JSON_TYPES)}"
        raise Refused("unsupported-media-type", detail, headers={"Accept-Patch": ", ".join(JSON_TYPES)})
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Refused("body-too-large", f"the body is larger than {MAX_BODY_BYTES} bytes")
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise Refused("bad-json", "the body is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # broken JSON, text that is not UTF-8, numbers with thousands of digits
        raise Refused("bad-json", f"the body is not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
