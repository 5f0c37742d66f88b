"""Runs `ftb-llm train` as a job of an existing Ray cluster: submits it, follows its log, returns its exit code.

What travels is the resolved config, not the files and words that it came from. ftb_llm itself has to be installed where the
cluster's workers run. Whatever else the config names (a reward module, a data file) has to be readable there too.
"""

import asyncio
import logging
import os
import shlex
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ftb_llm.config.schema import Config
from ftb_llm.errors import ClusterLost, SetupError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOP_SECONDS = 120  # what a stopped run has to write its checkpoint and report; Ray's own default is 3
CONFIG_FILE = "config.yaml"
ENDED = ("SUCCEEDED", "STOPPED", "FAILED")

# Ray runs a job's command in a shell whose PATH may know nothing of the environment that the cluster was started from.
# The raylet, further up the process tree, does: its command line names the interpreter of its workers, where the actors will run.
LAUNCHER = """\
pid=$$
workers=
while [ -z "$workers" ] && [ "${pid:-0}" -gt 1 ]; do
    pid=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$pid/status" 2> /dev/null)
    workers=$(tr '\\0' '\\n' 2> /dev/null < "/proc/$pid/cmdline" | sed -n 's/^--python_worker_command=\\(.*\\) [^ ]*setup_worker.py .*/\\1/p')
done
for python in "$workers" python3 python; do
    if [ -n "$python" ] && "$python" -c 'import ftb_llm' 2> /dev/null; then
        export FTB_LLM_IN_JOB=1
        exec "$python" -m ftb_llm.cli.main "$@"
    fi
done
echo "ftb-llm: error: no Python on the cluster's head can import ftb_llm (tried: $workers python3 python); install it there" >&2
exit 2
"""


def submit(config: Config, *, resume: Path | None) -> int:
    """Run `config` on the cluster that RAY_ADDRESS names and return the job's exit code."""
    words = ["train", CONFIG_FILE]
    if resume:
        words += ["--resume", str(resume.absolute())]
    with tempfile.TemporaryDirectory(prefix="ftb_llm_job_") as folder:
        return submit_entrypoint(write_job(Path(folder), config, words), working_dir=folder)


def write_job(folder: Path, config: Config, words: Sequence[str]) -> str:
    """Write what travels into `folder`, and return the shell command that runs `ftb-llm` with these words there."""
    (folder / "job.sh").write_text(LAUNCHER, encoding="utf-8")
    # YAML, not JSON: YAML 1.1 reads JSON's 1e-05 as text.
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(rooted(config), sort_keys=False), encoding="utf-8")
    return shlex.join(["exec", "sh", "job.sh", *words])


def rooted(config: Config) -> dict[str, Any]:
    """The config with relative paths made absolute: the job's working folder is a temporary one of Ray's."""
    tree = config.model_dump(mode="json")
    tree["run"]["dir"] = str(Path(config.run.dir).absolute())
    for section in ("model", "data"):
        path = Path(tree[section]["path"])
        if path.exists():
            tree[section]["path"] = str(path.absolute())
    return tree


def submit_entrypoint(entrypoint: str, *, working_dir: str | None = None) -> int:
    """Run a shell command as a job and show its log. Returns 0 only if the job succeeded, 128 + signal when interrupted."""
    address = os.environ["RAY_ADDRESS"]
    use_token_lying_ready()
    with cluster_errors(address):
        client = connect(address)
        runtime_env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
        if working_dir:
            runtime_env["working_dir"] = working_dir
        job = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
    print(f"submitted job {job} to {client.get_address()}", flush=True)
    return asyncio.run(_follow(client, job))


def use_token_lying_ready() -> None:
    """Switch Ray's token authentication on where a token is at hand, as `ray start` does. Ray reads the mode once, when it is imported."""
    at_hand = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or (Path.home() / ".ray" / "auth_token").is_file()
    if at_hand:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def connect(address: str) -> "JobSubmissionClient":
    """A client of the cluster's job server; `address` is its dashboard, its head, or auto."""
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return JobSubmissionClient(address)


@contextmanager
def cluster_errors(address: str) -> Iterator[None]:
    """Ray's and HTTP's ways to say that the cluster can't be used, each as one clear line."""
    from ray.exceptions import AuthenticationError, RayError
    from requests import RequestException

    try:
        yield
    except AuthenticationError:
        raise SetupError(
            f"RAY_ADDRESS: the cluster at {address} refuses the token: set RAY_AUTH_MODE=token, and give the cluster's own token "
            "in ~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        ) from None
    except (RayError, RequestException, OSError, RuntimeError, ValueError) as error:
        raise SetupError(
            f"RAY_ADDRESS: the cluster at {address} can't be used: {_first_line(error)}; "
            "it should be http://HOST:8265 (its dashboard), HOST:6379 (its head) or auto, and the cluster should be up"
        ) from None


async def _follow(client: "JobSubmissionClient", job: str) -> int:
    """Show the log until the job has ended. The first Ctrl-C (or SIGTERM) stops the job and waits, a second one stops waiting."""
    interrupted: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()
    with _signals(interrupted.set_result):
        log = asyncio.create_task(_copy_log(client, job))
        await asyncio.wait((log, interrupted), return_when=asyncio.FIRST_COMPLETED)
        if interrupted.done():
            print(f"stopping job {job}; it writes a checkpoint first. Ctrl-C again to stop waiting for it", flush=True)
            await _ask(client, client.stop_job, job)
        info = await log
    if interrupted.done():
        print(f"job {job}: {info.status.value.lower()}", flush=True)
        return 128 + interrupted.result()
    if info.status == "SUCCEEDED":
        return 0
    print(f"job {job}: {info.status.value.lower()}{'' if info.driver_exit_code is not None else f': {info.message}'}", flush=True)
    code = info.driver_exit_code or 1
    return code if code > 0 else 128 - code  # the shell's way to say that a signal ended it


@contextmanager
def _signals(notify: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Report the first SIGINT or SIGTERM to `notify`; later ones do what they do by default."""
    loop = asyncio.get_running_loop()
    caught = (signal.SIGINT, signal.SIGTERM)

    def first(received: signal.Signals) -> None:
        release()
        notify(received)

    def release() -> None:
        for number in caught:
            loop.remove_signal_handler(number)

    for number in caught:
        loop.add_signal_handler(number, first, number)
    try:
        yield
    finally:
        release()


async def _copy_log(client: "JobSubmissionClient", job: str) -> Any:
    """Copy the job's log until the job has ended, and return Ray's record of it. A broken connection is taken up where it broke."""
    from aiohttp import ClientError

    shown = 0
    while True:
        try:
            seen = 0
            async for text in client.tail_job_logs(job):
                fresh = text[max(0, shown - seen) :]
                seen += len(text)
                shown = max(shown, seen)
                print(fresh, end="", flush=True)
        except (ClientError, RuntimeError) as error:  # RuntimeError is Ray's word for a connection that broke
            logging.getLogger(__name__).warning("lost the log of job %s (%s); following again", job, error)
        info = await _ask(client, client.get_job_info, job)
        if info.status in ENDED:
            return info
        await asyncio.sleep(1.0)


async def _ask(client: "JobSubmissionClient", call: Callable[[str], Any], job: str) -> Any:
    """One request about the job, off the event loop."""
    try:
        return await asyncio.to_thread(call, job)
    except (OSError, RuntimeError) as error:
        raise ClusterLost(f"lost the cluster at {client.get_address()} ({_first_line(error)}); job {job} may still be running there") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
