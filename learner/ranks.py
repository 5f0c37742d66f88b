"""Several learner processes as one: who this process is among them, and the few things that they tell each other.

Every rank holds the same adapter and the same optimizer state, gets every request whole, and computes its own share of the
step's groups. The losses divide by the whole step's denominator, so the ranks' gradients simply add up to the step's.
"""

import os
import socket
import time
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

T = TypeVar("T")


class Ranks:
    """This process among the learner's; alone, everything here does nothing.

    There is no DistributedDataParallel: it would start a reduction in every backward pass, of which a step has one per
    micro-batch, and again for parameters that a micro-batch did not reach. The gradients of a LoRA adapter are small, so one
    sum over all of them, once per step, is data parallelism with the least to say, and it leaves the model unwrapped.

    Before each exchange the ranks meet at a barrier. An exchange ends for nobody before the slowest rank has begun it; without
    the barrier its time would hold the wait for that rank, and nobody could tell uneven shares from a slow network. A barrier
    costs one more message without content, twice a step, and nothing else: the exchange could not have begun earlier.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self._accelerator = accelerator
        self._wait_seconds = 0.0
        self._communication_seconds = 0.0

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every rank the sum of all ranks' gradients; a parameter without one counts as zero.

        It ends when the sum is there, and not merely asked for, so that the time it takes is its own.
        """
        if self.count == 1:
            return
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
        self._wait_seconds += self._meet()
        began = time.perf_counter()
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)])
        self._finish_computing()
        self._communication_seconds += time.perf_counter() - began

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank.

        The waits travel along, and the longest one counts: the slowest rank, which may be the one that reports, waits for nobody.
        """
        if self.count == 1:
            return [value]
        waited = self._meet()
        began = time.perf_counter()
        told: list[Any] = [None] * self.count
        dist.all_gather_object(told, (waited, value))
        self._communication_seconds += time.perf_counter() - began
        self._wait_seconds += max(seconds for seconds, _ in told)
        return [value for _, value in told]

    def take_metrics(self) -> dict[str, float]:
        """Seconds since the last call that were lost to uneven ranks, and that their exchanges took; nothing where there is one rank."""
        if self.count == 1:
            return {}
        metrics = {"time/rank_wait_seconds": self._wait_seconds, "time/communication_seconds": self._communication_seconds}
        self._wait_seconds = self._communication_seconds = 0.0
        return metrics

    def _meet(self) -> float:
        """Go on when every rank is here; returns the seconds that took. What this rank's own GPU still computes is not among them."""
        self._finish_computing()
        began = time.perf_counter()
        self._accelerator.wait_for_everyone()
        return time.perf_counter() - began

    def _finish_computing(self) -> None:
        if self._accelerator.device.type == "cuda":
            torch.cuda.synchronize(self._accelerator.device)


def free_address(host: str) -> str:
    """`host`, an address of this machine, with a port that is free: where rank 0 will wait for the others."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def open_store(host: str) -> tuple[str, dist.TCPStore]:
    """Where the ranks will meet, and its address; it listens on `host` alone, while torch's own would on every interface."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    return f"{host}:{port}", dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def join_store(*, rank: int, count: int, address: str, threads: int) -> None:
    """Like `join`, for a store that is open already: torch's launcher has names for that, which its rendezvous follows."""
    join(rank=rank, count=count, address=address, threads=threads)
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def join(*, rank: int, count: int, address: str, threads: int) -> None:
    """Tell accelerate, through the environment, that this process is one of `count`; it meets the others when a model is built.

    LOCAL_RANK chooses the GPU among those that a process sees. Each rank is an actor, and Ray shows it no GPU but its own.
    """
    host, _, port = address.rpartition(":")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": host, "MASTER_PORT": port}
    os.environ["OMP_NUM_THREADS"] = str(threads)
