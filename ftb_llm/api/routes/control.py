"""Commands to the live run."""

from fastapi import APIRouter

from ftb_llm.api.models import Accepted
from ftb_llm.api.port import Run, Source
from ftb_llm.api.problems import document

router = APIRouter(prefix="/v1/control", tags=["control"], responses=document("wrong-state"))


@router.post("/stop", status_code=202, summary="Stop cleanly")
async def stop(run: Run, source: Source) -> Accepted:
    """Finishes the step in progress, writes a checkpoint and ends the run."""
    run.request_stop(source)
    return Accepted(action="stop", poll="/v1/status", until="state is stopped; then the server is gone")


@router.post("/checkpoint", status_code=202, summary="Write a checkpoint")
async def checkpoint(run: Run, source: Source) -> Accepted:
    """Writes a checkpoint at the next step boundary."""
    details = run.request_checkpoint(source)
    return Accepted(**{"action": "checkpoint", "poll": "/v1/status", "until": "last_checkpoint is at least after_step", **details})
