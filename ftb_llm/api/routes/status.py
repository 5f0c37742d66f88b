"""The run at a glance."""

from typing import Any

from fastapi import APIRouter

from ftb_llm.api.models import Status
from ftb_llm.api.port import Run

router = APIRouter(prefix="/v1", tags=["status"])


@router.get("/status", summary="The run at a glance", response_model=Status)
async def status(run: Run) -> dict[str, Any]:
    """State, step, policy and config versions, actors, queue, staleness, throughput, rewards and accounting."""
    return run.status()
