"""Read and change the config of the live run."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response

from ftb_llm.api.body import JSON_TYPES, read_json
from ftb_llm.api.models import ConfigHistory, ConfigHistoryItem, ConfigPatched, CurrentConfig
from ftb_llm.api.port import Run, Source
from ftb_llm.api.problems import Refused, document
from ftb_llm.api.settings_schema import settings_schema

router = APIRouter(prefix="/v1", tags=["config"])

_ETAG: dict[str, Any] = {"ETag": {"description": "Names this version, for If-Match.", "schema": {"type": "string"}}}
_PATCH = {"schema": {"$ref": "#/components/schemas/ConfigPatch"}, "example": {"objective": {"divergence": {"name": "hellinger"}}}}
# Its absence has an answer of its own, 428, so FastAPI is not told that the header is required; clients are.
_IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "required": True,
    "description": "The ETag of the version the patch is meant for, or * for any.",
    "schema": {"type": "string"},
    "example": "*",
}
_PATCH_REQUEST = {"parameters": [_IF_MATCH], "requestBody": {"required": True, "content": dict.fromkeys(JSON_TYPES, _PATCH)}}
MOST_VERSIONS = 2**31 - 1
_PATCH_PROBLEMS = (
    "bad-request",
    "bad-json",
    "fixed-setting",
    "wrong-state",
    "stale-config",
    "body-too-large",
    "unsupported-media-type",
    "invalid-config",
    "precondition-required",
    "not-recorded",
    "disk-full",
)


@router.get("/config", summary="The resolved config", response_model=CurrentConfig, responses={200: {"headers": _ETAG}, 304: {"description": "Not changed"}})
async def read_config(run: Run, response: Response, if_none_match: Annotated[str | None, Header()] = None) -> CurrentConfig | Response:
    """Every setting of the newest version, and its ETag."""
    current = run.ledger.current
    if if_none_match is not None and _names(if_none_match, current.etag):
        return Response(status_code=304, headers={"ETag": current.etag})
    response.headers["ETag"] = current.etag
    return CurrentConfig(version=current.version, config=current.config.model_dump(mode="json"))


@router.patch("/config", summary="Change live settings", responses={200: {"headers": _ETAG}, **document(*_PATCH_PROBLEMS)}, openapi_extra=_PATCH_REQUEST)
async def patch_config(
    run: Run,
    source: Source,
    request: Request,
    response: Response,
    if_match: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> ConfigPatched:
    """A JSON merge patch (RFC 7386): name what changes; null puts a setting back to its default. It takes effect at `effective_step`."""
    if if_match is None:
        raise Refused("precondition-required", f"send If-Match with the ETag of GET /v1/config, now {run.ledger.etag}, or * for any version")
    merge_patch = await read_json(request)
    before = run.ledger.current
    after = run.ledger.patch(merge_patch, if_match=if_match, source=source)
    response.headers["ETag"] = after.etag
    return ConfigPatched(config_version=after.version, effective_step=after.effective_step, changed={} if after is before else after.changed)


@router.get("/config/schema", summary="JSON Schema of the settings")
async def config_schema() -> dict[str, Any]:
    """What a patch may hold: each setting's type, default, limits and meaning, and whether it is live."""
    return settings_schema()


@router.get("/config/history", summary="The versions of the config")
async def config_history(
    run: Run,
    since: Annotated[int | None, Query(ge=0, le=MOST_VERSIONS, description="Only versions above this one; without it the newest ones.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="How many at most.")] = 100,
) -> ConfigHistory:
    """Who changed what, when, and from which step on; oldest first."""
    total = run.ledger.current.version
    since = max(0, total - limit) if since is None else since
    changes = run.ledger.history(since=since, limit=limit)
    last = changes[-1].version if changes else total
    return ConfigHistory(
        total=total,
        next=last if last < total else None,
        versions=[
            ConfigHistoryItem(version=item.version, effective_step=item.effective_step, source=item.source, time=item.time, changed=item.changed)
            for item in changes
        ],
    )


def _names(if_none_match: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags
