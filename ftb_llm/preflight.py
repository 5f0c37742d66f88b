"""What can be known to be wrong before anything heavy is imported: a mistake is told in a second, not after torch, vLLM and Ray."""

import os
from pathlib import Path

from ftb_llm.api.loopback import is_loopback
from ftb_llm.api.token import cleaned
from ftb_llm.config.schema import Config
from ftb_llm.errors import SetupError
from ftb_llm.run_dir import RunDir

SHORTEST_TOKEN = 16


def check_first(config: Config, *, resume: Path | None) -> None:
    """Raise `SetupError` for a name that is taken, a port in use, or a token that is missing or too short."""
    if resume is None and config.run.name:
        RunDir.check_free(Path(config.run.dir) / config.run.name)
    read_token(config)
    if config.control.enabled:
        from ftb_llm.api.server import check_port

        check_port(config.control.host, config.control.port)


def read_token(config: Config) -> str | None:
    """The control plane's bearer token; None where the config wants none."""
    name = config.control.token_env
    if name is None:
        return None
    text = os.environ.get(name, "")
    token = cleaned(text, name=f"control.token_env: {name}")
    if not token:
        fault = "holds only white space" if text else "is not set"
        raise SetupError(f"control.token_env: the environment variable {name} {fault}; it must hold the bearer token")
    if len(token) < SHORTEST_TOKEN and not is_loopback(config.control.host):
        raise SetupError(
            f"control.token_env: the token in {name} has {len(token)} characters; where control.host {config.control.host} is not loopback "
            f"it needs {SHORTEST_TOKEN} at least, such as openssl rand -hex 32 prints"
        )
    return token
