from pathlib import Path

from starlette.routing import Route

from ftb_llm.api.app import create_app

REST = Path(__file__).parents[2] / "docs" / "rest.md"


class NoRun:
    """The routes are looked at, never called."""


def test_every_route_is_in_the_docs() -> None:
    text = REST.read_text(encoding="utf-8")
    named = 0
    for route in create_app(NoRun()).routes:
        assert isinstance(route, Route), route
        if route.include_in_schema:
            for method in route.methods - {"HEAD"}:
                assert f"`{method} {route.path}`" in text, f"docs/rest.md does not name {method} {route.path}"
                named += 1
        else:
            assert f"`{route.path}`" in text, f"docs/rest.md does not name {route.path}"
    assert named >= 9
