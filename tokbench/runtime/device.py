"""Networks on a device: the one place where they are moved, counted and hashed, and where precision is set."""

import contextlib
import gc
import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tokbench.errors import MODEL_ERRORS, CellError, InputError, first_line, place
from tokbench.runtime.terminal import say
from tokbench.tokenizer import Tokenizer

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WITHOUT_FLOAT64 = ("mps",)
DEVICES = "auto, cpu, cuda, cuda:N or mps"
OUT_OF_MEMORY = (  # the last: a kernel of 32-bit indices, which a smaller batch suits as well
    "out of memory", "can't allocate memory", "unable to find an engine", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED", "less than INT_MAX elements",
)  # fmt: skip


def select_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`; plain CUDA is this process's own GPU. InputError if it is not there.

    `mps`, a Mac's GPU, is taken only if asked for: we have never run on one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'unknown device "{name}": {DEVICES}') from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f'device "{name}" is not supported: {DEVICES}')
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f'device "{name}": torch finds no Apple GPU here; try --device cpu')
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise InputError(
                f'device "{name}": this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu'
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16; without, torch emulates it many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())


def cpu_flags() -> set[str]:
    """What Linux says that this processor can do (x86: flags, ARM: Features); elsewhere nothing."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return set()


def exact_device(device: torch.device | str) -> torch.device:
    """Where to compute in float64 for a device: on itself, or on the CPU if it has no such numbers."""
    return torch.device("cpu") if torch.device(device).type in WITHOUT_FLOAT64 else torch.device(device)


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """The values as float64, on their `exact_device`."""
    return values.to(exact_device(values.device)).double()


def warn_of_emulation(dtype: torch.dtype, device: torch.device) -> None:
    """Say so where a run in bfloat16 will be slower than one in float32. InputError for anything but float32 on MPS."""
    if device.type == "mps" and dtype != torch.float32:
        raise InputError(f"{str(dtype).removeprefix('torch.')} on mps: only float32 is known to be right there")
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        say(f"warning: {describe_device(device)} has no bfloat16; emulated it is many times slower than float32")


def describe_device(device: torch.device) -> str:
    """What a table's caption calls the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU (MPS, {platform.machine()})"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"CPU {model}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def find_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f'unknown dtype "{name}": {", ".join(DTYPES)}')
    return DTYPES[name]


def prepare(tokenizer: Tokenizer, device: torch.device) -> None:
    """Put every network on the device: eval mode, channels last. CellError if it does not fit, or fails at that."""

    def channels_last(weight: torch.Tensor) -> torch.Tensor:
        return weight.to(memory_format=torch.channels_last) if weight.ndim == 4 else weight  # a Conv3d has five

    try:
        for network in tokenizer.networks.values():
            network.eval().to(device)._apply(channels_last)
    except MODEL_ERRORS as error:
        why = f"cannot be put on {device} ({first_line(error)}){place(error)}"
        if is_out_of_memory(error):
            why = f"its weights do not fit into the memory of {describe_device(device)}"
        raise CellError(f"{tokenizer.info.name}: {why}") from error


def count_parameters(network: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in network.parameters()) if network is not None else 0


def hash_state(tokenizer: Tokenizer) -> str | None:
    """sha256 over names, types, shapes and bytes of all parameters and buffers, in `networks` or in attributes.

    None without `networks`, or where a state holds other things than tensors: a hash would promise too much.
    """
    networks = getattr(tokenizer, "networks", None)
    if networks is None:
        return None
    known = {id(t) for network in networks.values() for t in [*network.parameters(), *network.buffers()]}
    states: dict[str, dict[str, Any]] = {part: network.state_dict() for part, network in networks.items()}
    states[""] = dict(_outside(tokenizer, known))
    digest = hashlib.sha256()
    for part, state in sorted(states.items()):
        for name, tensor in sorted(state.items()):
            if not isinstance(tensor, torch.Tensor):
                return None
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _outside(owner: Any, known: set[int], depth: int = 2) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in attributes of the tokenizer (or of a part of it) and of their modules that are not `known`."""
    values = dict(getattr(owner, "__dict__", {}))
    if isinstance(owner, nn.Module):
        values |= owner._modules | owner._parameters | owner._buffers
    for name, value in values.items():
        if isinstance(value, nn.Module):
            tensors = [*value.named_parameters(), *value.named_buffers()]
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in tensors if id(tensor) not in known)
        elif isinstance(value, torch.Tensor):
            if id(value) not in known:
                yield name, value
        elif depth > 1 and hasattr(value, "networks"):
            yield from ((f"{name}.{inner}", found) for inner, found in _outside(value, known, depth - 1))


@contextlib.contextmanager
def precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Without gradients, under autocast for anything but float32; float32 means float32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False  # TF32 rounds factors to 10 bits
    # In inference mode autocast would cast every weight anew in every call of a layer.
    ungraded: contextlib.AbstractContextManager[None] = (
        torch.inference_mode() if dtype == torch.float32 else torch.no_grad()
    )
    try:
        with ungraded, torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def casts_kept(device: torch.device) -> torch.autocast:
    """Inside, the copies that autocast makes of weights last from one `precision` to the next: they are cast once.

    Of weights that want gradients, as those of a loaded network do. They must not change meanwhile.
    """
    return torch.autocast(device.type, enabled=False)


def is_out_of_memory(error: BaseException) -> bool:
    """torch, cuDNN and cuBLAS say it in different ways."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in str(error) for s in OUT_OF_MEMORY)


def unless_full(call: Callable[[], T]) -> T | None:
    """What the call gives, None if memory does not suffice; the traceback, which keeps tensors alive, ends here."""
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def to_host(groups: Sequence[Mapping[Any, Tensor]]) -> Callable[[], list[dict[Any, np.ndarray]]]:
    """Start to copy tensors to the host, those of a GPU as one; the call waits for the copy and gives their arrays."""
    tensors = [tensor.detach().contiguous() for group in groups for tensor in group.values()]
    far = [tensor for tensor in tensors if tensor.device.type == "cuda"]
    if far:
        packed = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in far])
        landed, arrived = packed.to("cpu", non_blocking=True), torch.cuda.Event()  # torch gives it pinned memory
        arrived.record()

    def wait() -> list[dict[Any, np.ndarray]]:
        if far:
            arrived.synchronize()
            parts = iter(landed.split([tensor.nbytes for tensor in far]))
        arrays = iter(
            next(parts).clone().view(tensor.dtype).view(tensor.shape).numpy()
            if tensor.device.type == "cuda"
            else tensor.cpu().numpy()
            for tensor in tensors
        )
        return [{key: next(arrays) for key in group} for group in groups]

    return wait


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def release(device: torch.device) -> None:
    """Hand back memory that nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "mps":
        torch.mps.empty_cache()
