"""CUDA tensors on a machine without a card: they have everything but data (torch's FakeTensorMode).

A value that is read back (`item`, `tolist`, `if tensor`) raises; what is copied between host and device is listed.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from ssdd_models import flow

if TorchVersion(torch.__version__) < "2.14":
    pytest.skip("fake CUDA tensors want a driver before torch 2.14", allow_module_level=True)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
PRODUCTS = ("aten::convolution", "aten::conv2d", "aten::mm", "aten::addmm", "aten::linear")


class Watch(TorchDispatchMode):
    """Lists copies between devices, those that wait for both and those that do not, the types of products, and weights
    that are cast."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []
        self.sent: list[str] = []
        self.casts: list[str] = []
        self.products: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.device.type for x in args if isinstance(x, Tensor) and x.ndim}
        if func._schema.name in PRODUCTS and "cuda" in given:
            self.products.add(out.dtype)
        weights = [x for x in args if isinstance(x, nn.Parameter)]
        if "to" in func._schema.name and weights and out.dtype != weights[0].dtype:
            self.casts.append(f"{func} {tuple(out.shape)}")
        if isinstance(out, Tensor) and given and out.device.type not in given:
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            copies = self.sent if (named | (kwargs or {})).get("non_blocking") else self.waited
            copies.append(f"{func} {tuple(out.shape)} to {out.device.type}")
        return out


class Waited(Exception):
    """The host would now wait for the GPU."""


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, **_: Any) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None:
        raise Waited


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Tensors made inside hold nothing; autocast for CUDA works although there is none, and so do gradients."""
    times = {steps: flow.sampler_times(steps) for steps in (1, 7, 8)}  # computed on the CPU, of real numbers
    monkeypatch.setattr(flow, "sampler_times", lambda steps, shift=2.0: times[steps])
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "no card")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        yield watch


def moved(network: nn.Module, *_: Any, **__: Any) -> nn.Module:
    """A network to fake CUDA, its memory formats kept: what `Module.to` cannot do with fake tensors."""
    for module in network.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
                    wanted = isinstance(tensor, nn.Parameter)
                    store[name] = nn.Parameter(fake, tensor.requires_grad) if wanted else fake
    return network


def empty(make: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory, its weights in channels_last."""
    with torch.device("meta"):
        return make().to(memory_format=torch.channels_last)


# ---- gradients: autograd's engine wants a driver for each device, its nodes do not --------------------------------


def in_order(root: Any) -> list[Any]:
    """The nodes behind `root`, each before those that it needs the gradient of."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(after, False) for after, _ in node.next_functions if after is not None]
    return order[::-1]


def gradients(loss: Tensor, inputs: Sequence[Tensor] | Tensor | None = None, **_: Any) -> tuple[Tensor, ...]:
    """As torch.autograd.grad; without `inputs` into the `grad` of every leaf. Devices must not change on the way."""
    wanted = None if inputs is None else [inputs] if isinstance(inputs, Tensor) else list(inputs)
    leaves: dict[int, Tensor] = {}
    waiting: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {loss.output_nr: torch.ones_like(loss)}}
    for node in in_order(loss.grad_fn):
        given, places = waiting.pop(node, None), node._input_metadata
        if given is None:
            continue
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = given[0]
            if wanted is None:
                node.variable.grad = given[0] if node.variable.grad is None else node.variable.grad + given[0]
            continue
        with torch.no_grad():
            found = node(*(given.get(place) for place in range(len(places))))
        for (after, place), gradient in zip(
            node.next_functions, found if isinstance(found, tuple) else (found,), strict=False
        ):
            if after is None or gradient is None:
                continue
            like = after._input_metadata[place]
            assert gradient.device == like.device, f"{node} gives a gradient on {gradient.device}"
            gradient = gradient.sum_to_size(tuple(like.shape)).to(like.dtype)
            into = waiting.setdefault(after, {})
            into[place] = gradient if place not in into else into[place] + gradient
    return tuple(leaves[id(leaf)] for leaf in wanted or ())


def backward(loss: Tensor, *_: Any, **__: Any) -> None:
    gradients(loss)
