"""The address by itself: what this is, and where to go on."""

from fastapi import APIRouter

from ftb_llm import __version__
from ftb_llm.api.models import Index

router = APIRouter(tags=["docs"])


@router.get("/", summary="What is served here")
async def index() -> Index:
    """Names the page for people, the document for programs, and where the run's status is."""
    return Index(version=__version__)
