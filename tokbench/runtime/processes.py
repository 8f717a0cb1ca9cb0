"""Several processes (torchrun, Slurm): each measures its share of the images, rank 0 writes.

Nothing is reduced on a device: every process appends to its own files under the run's working folder, and metrics are
computed from all of them. So gloo, with small messages only, serves CPU and CUDA runs alike.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokbench.errors import CellError, InputError, first_line

TIMEOUT = timedelta(minutes=30)  # how long the others wait for a process that has stopped answering


class LostPeerError(CellError):
    """Another process of this run has died: nothing more can be measured here."""


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank. LostPeerError if one does not answer."""
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise LostPeerError(
                f"rank {self.rank}: another process ended or hangs; its own message says why"
            ) from error
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]

    def agree(self, error: CellError | InputError | None) -> None:
        """Raise the first rank's error on all ranks, so that none goes on alone."""
        first = next((e for e in self.gather(error) if e is not None), None)
        if first is not None:
            raise first


def join() -> World:
    """The world that torchrun (or Slurm with its variables) has set up; one process without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start with torchrun")
    if not dist.is_initialized():
        try:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        except RuntimeError as error:
            raise InputError(f"cannot reach the other {size - 1} processes: {first_line(error)}") from error
    return World(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))


def leave() -> None:
    """Close the connections; the processes of a failed run may already be gone."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Machine:
    """The device and this process among those started by torchrun or accelerate."""

    def __init__(self, run: Any) -> None:
        from accelerate import Accelerator

        if run.device == "cuda" and not torch.cuda.is_available():
            raise InputError("run.device=cuda: no CUDA device here; use cpu")
        self.accelerator = Accelerator(cpu=run.device == "cpu" or not torch.cuda.is_available())
        self.device, self.dtype = self.accelerator.device, run.dtype
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.rank == 0
        if run.batch_size % (self.world * run.accumulate):
            raise InputError(
                f"run.batch_size={run.batch_size} cannot be cut into {self.world} x {run.accumulate} parts"
            )
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return value if self.world == 1 else self.accelerator.reduce(value, reduction="mean")

    def means(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Each value's mean over all processes, in one exchange."""
        flat = self.mean(torch.stack([value.float().reshape(()).to(self.device) for value in values.values()]))
        return dict(zip(values, flat.tolist(), strict=True))

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """One flat all-reduce per step. Not DistributedDataParallel: it sees only `forward`, and its order of sums
        depends on its buckets, while two optimisers, accumulation and adaptive weights want plain gradients."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.mean(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
