"""Settings of a run, optimiser and schedule, averages of weights, and the perceptual losses."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokbench.data.training_crops import CropConfig
from tokbench.errors import InputError, first_line
from tokbench.runtime.device import has_bfloat16

COMPILED_FROM = 5000  # steps: compilation takes minutes


@dataclass(frozen=True)
class OptimConfig:
    """AdamW or schedule-free RAdam, and what is done to the gradient. Raises ValueError for values neither takes."""

    name: Literal["radam-schedulefree", "adamw"] = "radam-schedulefree"
    learning_rate: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 1e-3  # of weights, not of biases nor of relative bias tables
    clip: float = 0.1  # largest norm of the gradient
    warmup_steps: int = 0  # linear, from 0
    schedule: Literal["constant", "cosine"] = "constant"  # cosine ends at final_share of the rate
    final_share: float = 0.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: two numbers from 0 to below 1")
        if self.learning_rate < 0 or self.weight_decay < 0:
            raise ValueError(f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay}: below 0")


@dataclass(frozen=True)
class EmaConfig:
    """decay = min(decay, (1 + n) / (10 + n)) after n updates; before `start_step` the average is a plain copy."""

    decay: float = 0.999
    start_step: int = 50_000


@dataclass(frozen=True)
class RunConfig:
    """How long a run is, on what, and how often it reports. Raises ValueError for numbers below their least."""

    steps: int = 500_000
    batch_size: int = 256  # over all processes
    accumulate: int = 1  # the batch of a process is taken in this many parts
    seed: int = 0
    # Of autocast; weights and losses stay float32. auto: bfloat16 where the hardware has it, else float32.
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    workers: int | Literal["auto"] = "auto"  # processes that read images; auto: see Session.workers
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: on CUDA, for runs long enough to repay it
    checkpoint_activations: bool = False  # recompute in the backward pass instead of keeping
    log_every: int = 20
    sample_every: int = 1000
    save_every: int = 500
    eval_every: int = 2000
    eval_resolution: int = 256
    held_out: int = 14  # images kept for scoring, of the data itself or of held_out_data; 0: none
    held_out_data: str | None = None  # a folder, as --data
    eval_metrics: tuple[str, ...] = ("psnr", "lpips-alex")
    best_by: str = "lpips-alex"  # the held-out metric that chooses best.safetensors
    loss_limit: float = 1e4  # a loss above this, but the KL summed over a latent, stops the run
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # where the log goes beside log.jsonl

    def on(self, device: torch.device) -> "RunConfig":
        """The settings with `auto` decided for a device, but for `workers`, which depends on the data too."""
        exact, long = "bfloat16" if has_bfloat16(device) else "float32", self.steps >= COMPILED_FROM
        compiled = device.type == "cuda" and find_spec("triton") is not None and long
        return replace(
            self,
            dtype=exact if self.dtype == "auto" else self.dtype,  # type: ignore[arg-type]
            compile=compiled if self.compile == "auto" else self.compile,
        )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if name in ("steps", "batch_size", "accumulate", "eval_resolution") else 0
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} {value}: must be at least {least}")


# ---- sizes --------------------------------------------------------------------------------------------------------


@contextmanager
def size_errors_as_input_errors(settings: str) -> Iterator[None]:
    """Inside, numbers that make no network become an InputError that names the settings they come from."""
    try:
        yield
    except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise InputError(f"{settings}: no network can be made of it: {first_line(error)}") from error


def check_sides(multiple: int, crops: CropConfig, run: RunConfig) -> None:
    """Raises InputError for a side of crops or of held-out images, in pixels, that is no multiple of this."""
    sides = {"crops.size": crops.size, "crops.late_size": crops.late_size}
    if run.held_out and run.eval_every:
        sides["run.eval_resolution"] = run.eval_resolution
    for name, side in sides.items():
        if side % multiple:
            raise InputError(f"{name}={side}: this model takes multiples of {multiple}")


# ---- optimisation -------------------------------------------------------------------------------------------------


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights (of normalisations too) are decayed; biases and relative bias tables are not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (decayed if name.endswith("weight") else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(named, config.weight_decay)
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw":
        fused = all(p.device.type == "cuda" for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)
    from schedulefree import RAdamScheduleFree

    averaging: torch.optim.Optimizer = RAdamScheduleFree(groups, lr=config.learning_rate, betas=betas)
    averaging.train()  # type: ignore[attr-defined]
    return averaging


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """The rate of a step, counted from 0."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        rate *= config.final_share + (1 - config.final_share) * share
    return rate


@contextmanager
def schedule_free_average(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, a schedule-free optimiser's parameters are its averaged ones; any other is left alone."""
    switch = hasattr(optimizer, "eval")
    if switch:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if switch:
            optimizer.train()  # type: ignore[attr-defined]


def optimizer_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate: float, clip: float
) -> Tensor:
    """Clip gradients that are averaged over processes, step, clear; returns their norm before clipping, on the device.

    A norm that is no number is noticed when it is read, before anything is saved (`Session.read`).
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Ema:
    """An exponential moving average of a module's parameters; buffers are taken as they are."""

    def __init__(self, module: nn.Module, config: EmaConfig) -> None:
        self.module, self.config, self.updates = module, config, 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step number `step`, counted from 0."""
        live = dict(self.module.named_parameters())
        if step < self.config.start_step:
            torch._foreach_copy_(list(self.shadow.values()), [live[name].detach() for name in self.shadow])
            return
        decay = min(self.config.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.shadow.values()), [live[name].detach() for name in self.shadow], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the averaged parameters."""
        live = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self._load(self.shadow)
        try:
            yield
        finally:
            self._load(live)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        for name, value in self.shadow.items():
            value.copy_(state["shadow"][name])

    @torch.no_grad()
    def _load(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(values[name])


def recompute(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let every submodule of these kinds keep no activations and run again in the backward pass."""
    for part in module.modules():
        if isinstance(part, kinds):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)


def place(
    networks: Iterable[nn.Module], run: RunConfig, device: torch.device, recomputed: tuple[type[nn.Module], ...]
) -> None:
    """Move networks to the device and change how they are run as the settings want."""
    if run.compile:
        from torch._functorch import config

        config.donated_buffer = False  # an adversarial weight goes backward through a graph twice
    for network in networks:
        network.to(device).to(memory_format=torch.channels_last)
        if run.checkpoint_activations:
            recompute(network, recomputed)
        if run.compile:
            network.compile(dynamic=False)  # sizes are those of the crops; symbolic ones take minutes to trace


# ---- losses -------------------------------------------------------------------------------------------------------

Perceptual = Literal["lpips-vgg", "lpips-alex", "dists"]


def perceptual_loss(name: Perceptual, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(real, fake) float [B, 3, H, W] in [-1, 1] -> [B], differentiable in `fake`."""
    from tokbench.metrics import perceptual

    if name == "dists":
        return perceptual.dists_network().to(device)
    network = perceptual.lpips_network(name.removeprefix("lpips-"), safe=True)
    return network.to(device).to(memory_format=torch.channels_last)
