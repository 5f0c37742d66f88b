"""What the control plane needs of a run; the controller implements it, the tests fake it."""

from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from ftb_llm.config.ledger import ConfigLedger


class RunPort(Protocol):
    """Every method returns at once: handlers call them on the controller's own event loop."""

    ledger: ConfigLedger

    def status(self) -> dict[str, Any]:
        """What `GET /v1/status` answers; see `models.Status`."""
        ...

    def not_ready_cause(self) -> str | None:
        """One line that says why the run makes no progress, or None when it does."""
        ...

    def request_stop(self, source: str) -> None:
        """Stop at the next step boundary; raises `WrongState` when the run is already stopping or over."""
        ...

    def request_checkpoint(self, source: str) -> dict[str, Any]:
        """Write a checkpoint at the next step boundary; returns what to wait for, such as its step. Raises `WrongState`."""
        ...

    def metrics_text(self) -> bytes:
        """The Prometheus exposition; see `prometheus.render`."""
        ...


def _run_of(request: Request) -> RunPort:
    run: RunPort = request.app.state.run
    return run


def _source_of(request: Request) -> str:
    """Who asks, for the records: `cli` for our own client, `rest` for anything else."""
    return "cli" if request.headers.get("user-agent", "").startswith("ftb-llm/") else "rest"


Run = Annotated[RunPort, Depends(_run_of)]
Source = Annotated[str, Depends(_source_of)]
