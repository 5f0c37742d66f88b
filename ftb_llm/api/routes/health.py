"""Is it alive, does it progress, and its numbers for Prometheus."""

from fastapi import APIRouter, Response

from ftb_llm.api.models import Health, Ready
from ftb_llm.api.port import Run
from ftb_llm.api.problems import Refused, document
from ftb_llm.api.prometheus import CONTENT_TYPE

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Health:
    """Answers whenever the process does. Needs no token."""
    return Health()


@router.get("/readyz", summary="Does the run make progress?", responses=document("not-ready"))
async def readyz(run: Run) -> Ready:
    """200 while the run makes progress; else 503, and `detail` names the cause."""
    cause = run.not_ready_cause()
    if cause is not None:
        raise Refused("not-ready", cause, headers={"Retry-After": "5"})
    return Ready()


@router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(run: Run) -> Response:
    """The run's numbers in the Prometheus text format."""
    return Response(run.metrics_text(), headers={"Content-Type": CONTENT_TYPE})
