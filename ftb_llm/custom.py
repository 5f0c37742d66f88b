"""The user's own divergence: `objective.custom`, an import path that only the config file or the command line can give."""

from functools import cache

from ftb_llm.divergences import Divergence
from ftb_llm.errors import ConfigError, InvalidConfig
from ftb_llm.rewards import load_object


@cache
def load_custom(path: str) -> Divergence:
    """Import `package.module:object`, a `Divergence` or a function without arguments that returns one."""
    found = load_object("objective.custom", path)
    try:
        divergence = found() if callable(found) else found
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        raise InvalidConfig([ConfigError("objective.custom", f"{path} made no divergence: {type(error).__name__}: {error}")]) from None
    if not isinstance(divergence, Divergence):
        kind = type(divergence).__name__
        raise InvalidConfig([ConfigError("objective.custom", f"{path} is a {kind}; it must be a Divergence, such as CustomDivergence(slope=...)")])
    return divergence
