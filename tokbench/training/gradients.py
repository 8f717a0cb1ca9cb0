"""Gradients averaged over processes, on GPUs while the backward pass is still running."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tokbench.runtime.processes import Processes

BUCKET = 25 << 20  # bytes that are exchanged at once
OVERLAPPED = ("cuda",)  # devices whose exchange runs beside the computation


class GradientAverage:
    """The mean over processes of the gradients of a model's parameters, in the gradients themselves.

    Flat, in one exchange after the backward pass, or overlapped: in buckets, each as soon as the last backward pass
    before a step (`expect` says which it is) has completed it. Not DistributedDataParallel, which sees only `forward`,
    while two optimisers, accumulation and adaptive weights want plain gradients. With two processes both ways give the
    same bits; with more the order of a ring's sums depends on the size of what is exchanged.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], processes: Processes) -> None:
        self.parameters, self.processes = list(parameters), processes
        self.overlapped = processes.size > 1 and any(p.device.type in OVERLAPPED for p in self.parameters)
        self.armed, self.missing = False, list[int]()  # gradients that each bucket still waits for
        self.launched: list[tuple[list[nn.Parameter], Tensor, Callable[[], None]]] = []
        if self.overlapped:
            # The last layers' gradients are there first.
            self.buckets = buckets_of(self.parameters[::-1], BUCKET)
            self.bucket_of = {id(p): number for number, bucket in enumerate(self.buckets) for p in bucket}
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._ready)

    def expect(self) -> None:
        """The next backward pass is the last one that adds to these gradients before `average`."""
        if self.overlapped:
            self.armed, self.missing = True, [len(bucket) for bucket in self.buckets]

    def average(self) -> None:
        """Every gradient becomes its mean; those that no process has stay None."""
        if not self.overlapped:
            average_gradients(self.parameters, self.processes)
            return
        self._launch(len(self.buckets))  # those that a parameter without a gradient kept waiting
        for parameters, flat, wait in self.launched:
            wait()
            scatter(parameters, flat.div_(self.processes.size))
        self.armed, self.launched = False, []

    def _ready(self, parameter: Tensor) -> None:
        if self.armed:
            self.missing[self.bucket_of[id(parameter)]] -= 1
            # In the order of their numbers, which is the same in all processes.
            complete = next((i for i, count in enumerate(self.missing) if count > 0), len(self.missing))
            self._launch(complete)

    def _launch(self, end: int) -> None:
        for bucket in self.buckets[len(self.launched) : end]:
            present = [p for p in bucket if p.grad is not None]
            flat = gathered(present) if present else torch.empty(0)
            self.launched.append((present, flat, self.processes.start_sum(flat) if present else lambda: None))


def buckets_of(parameters: Sequence[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Parameters in groups of about `size` bytes, in order."""
    groups: list[list[nn.Parameter]] = []
    used = size
    for parameter in parameters:
        if used >= size:
            groups.append([])
            used = 0
        groups[-1].append(parameter)
        used += parameter.numel() * parameter.element_size()
    return groups


def average_gradients(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    """All of them in one exchange."""
    present = [p for p in parameters if p.grad is not None]
    if processes.size > 1:
        scatter(present, processes.mean(gathered(present)))


def gathered(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients in one flat tensor."""
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def scatter(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Copy a flat tensor back into the gradients that it was made of."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
