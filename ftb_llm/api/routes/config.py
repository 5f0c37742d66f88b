"""Read and change the config of the live run."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from ftb_llm.api.body import JSON_TYPES, read_json
from ftb_llm.api.models import ConfigHistory, ConfigHistoryItem, ConfigPatched, CurrentConfig
from ftb_llm.api.port import Run, Source
from ftb_llm.api.problems import Refused, document

router = APIRouter(prefix="/v1", tags=["config"])

_ETAG: dict[str, Any] = {"ETag": {"description": "Names this version, for If-Match.", "schema": {"type": "string"}}}
_EXAMPLE = {"schema": {"type": "object", "example": {"objective": {"divergence": {"name": "hellinger"}}}}}
_PATCH_BODY = {"requestBody": {"required": True, "content": {media_type: _EXAMPLE for media_type in JSON_TYPES if media_type}}}
_PATCH_PROBLEMS = (
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


@router.patch("/config", summary="Change live settings", responses={200: {"headers": _ETAG}, **document(*_PATCH_PROBLEMS)}, openapi_extra=_PATCH_BODY)
async def patch_config(
    run: Run,
    source: Source,
    request: Request,
    response: Response,
    if_match: Annotated[str | None, Header(description="The ETag of the version the patch is meant for, or * for any.")] = None,
) -> ConfigPatched:
    """A JSON merge patch (RFC 7386): name what changes; null puts a setting back to its default. It takes effect at `effective_step`."""
    if if_match is None:
        raise Refused("precondition-required", f"send If-Match with the ETag of GET /v1/config, now {run.ledger.etag}, or * for any version")
    merge_patch = await read_json(request)
    before = run.ledger.current
    after = run.ledger.patch(merge_patch, if_match=if_match, source=source)
    response.headers["ETag"] = after.etag
    return ConfigPatched(config_version=after.version, effective_step=after.effective_step, changed={} if after is before else after.changed)


@router.get("/config/history", summary="All versions of the config")
async def config_history(run: Run) -> ConfigHistory:
    """Who changed what, when, and from which step on; oldest first."""
    versions = run.ledger.history()
    return ConfigHistory(
        versions=[
            ConfigHistoryItem(version=item.version, effective_step=item.effective_step, source=item.source, time=item.time, changed=item.changed)
            for item in versions
        ]
    )


def _names(if_none_match: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags
