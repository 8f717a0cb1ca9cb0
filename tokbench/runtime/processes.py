"""Several processes, started by torchrun or Slurm with its variables: each takes its share, rank 0 writes.

Measuring reduces nothing on a device: every process writes files of its own and metrics are computed from all of them,
so small messages over gloo serve. Training averages gradients, over NCCL where they lie on GPUs.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokbench.errors import CellError, InputError, LostPeerError, first_line

T = TypeVar("T")
GROUPS = itertools.count()  # joined by this process so far; the same in all of them
TIMEOUT = timedelta(minutes=30)  # how long the others wait for a process that has stopped answering


@dataclass(frozen=True)
class Processes:
    """This process among those of its run. Whatever needs the others raises LostPeerError if one is gone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    # shard: a job of its own that shares nothing with the others but the folder of results; merge: the one after them.
    job: Literal["", "shard", "merge"] = ""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0 or self.job == "shard"

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order, in every process."""
        if self.size == 1 or self.job == "shard":
            return [value]
        values: list[Any] = [None] * self.size
        with self._lost_peer():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, in every process."""
        return self.all_gather(value if self.main else None)[0]

    def together(self, call: Callable[[], T]) -> T:
        """The call's value, once all processes have made theirs; one's CellError or InputError is raised in all."""
        error: CellError | InputError | None = None
        try:
            value = call()
        except (CellError, InputError) as failure:
            error = failure
        if first := next((e for e in self.all_gather(error) if e is not None), None):
            raise first
        return value

    def by_main(self, call: Callable[[], T]) -> T:
        """What rank 0 gets from a call that no other process makes, in every process; or its error."""
        made: T = self.broadcast(self.together(lambda: call() if self.main else None))
        return made

    def wait(self) -> None:
        """Until all processes are here."""
        self.all_gather(None)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a float tensor over all processes, in the tensor itself."""
        if self.size > 1:
            with self._lost_peer():
                dist.all_reduce(value)
            value /= self.size
        return value

    def start_sum(self, value: Tensor) -> Callable[[], None]:
        """Begin to add a tensor up over all processes, in the tensor itself; what it returns waits for the sum."""
        with self._lost_peer():
            work = dist.all_reduce(value, async_op=True)

        def wait() -> None:
            with self._lost_peer():
                work.wait()

        return wait

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process. No device has to wait for it."""
        return float(self.mean(torch.tensor(float(flag)))) > 0

    @contextmanager
    def _lost_peer(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostPeerError(
                f"rank {self.rank}: another process ended or hangs; its own message says why"
            ) from error


def cores() -> int:
    """CPU cores for each process of this machine."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def join() -> Iterator[Processes]:
    """The processes that torchrun (or Slurm with its variables) has started, connected inside; one without it.

    Raises InputError if the variables are incomplete or the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start with torchrun")
    # Objects go by the CPU's backend, tensors by their device's; NCCL connects at its first tensor, or never.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
        # Under keys of its own: those that an earlier group of these processes left would be taken for this one's.
        store = dist.PrefixStore(f"tokbench-{next(GROUPS)}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except RuntimeError as error:
        raise InputError(f"cannot reach the other {size - 1} processes: {first_line(error)}") from error
    try:
        yield Processes(rank, size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:  # the processes of a failed run may already be gone
        dist.destroy_process_group()
