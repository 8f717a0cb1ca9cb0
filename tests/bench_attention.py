"""Milliseconds of one windowed attention by form, forward and with backward: what `choose_form` is decided by.

    python -m tests.bench_attention [--grids 16,32,64] [--batch 1,8] [--heads 6] [--width 64] [--compile] [--quick]

The fastest form of a line is starred. FlexAttention is measured with --compile alone.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ssdd_models.attention import SIDE, Form, choose_form, make_layout, windowed_attention
from tokbench.config import positive_numbers
from tokbench.runtime.device import DTYPES, select_device
from tokbench.speed.timing import QUICK, TimingBudget, take_turns

FORMS: tuple[Form, ...] = ("dense", "blocked", "flex")


def step(attention: Callable[..., Tensor], form: Form, side: int, given: tuple[Tensor, ...], backward: bool) -> None:
    """One attention on a square grid; its layout is made anew, as in every forward pass."""
    with torch.set_grad_enabled(backward):
        out = attention(*given, make_layout(side, side, given[0].device, form))
        if backward:
            torch.autograd.grad(out, given, torch.ones_like(out))


def line(arguments: argparse.Namespace, side: int, batch: int, backward: bool, budget: TimingBudget) -> str:
    device, dtype = select_device(arguments.device), DTYPES[arguments.dtype]
    tokens = (batch, side**2, arguments.heads * arguments.width)
    given = tuple(torch.randn(tokens, device=device, dtype=dtype).requires_grad_(backward) for _ in range(3))
    given += (torch.randn(SIDE, SIDE, arguments.heads, device=device).requires_grad_(backward),)
    attention: Callable[..., Tensor] = windowed_attention
    if arguments.compile:
        attention = torch.compile(windowed_attention, dynamic=False)
    forms = [
        form for form in FORMS if form != "flex" or (arguments.compile and not (backward and device.type == "cpu"))
    ]
    seconds = take_turns([partial(step, attention, form, side, given, backward) for form in forms], device, budget)
    times = [sorted(times)[len(times) // 2] * 1000 if times else math.inf for times in seconds]
    columns = [
        f"{form} {time:.3f}{'*' if time == min(times) else ' '}" for form, time in zip(forms, times, strict=True)
    ]
    kind = "forward+backward" if backward else "forward"
    return f"{side:4d} x {side:<4d} batch {batch:<3d} {kind:17s}" + "  ".join(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", default="16,32,48,64,128")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 256
    budget = QUICK if arguments.quick else TimingBudget(seconds=0.5)
    for side in positive_numbers(arguments.grids, "--grids"):
        chosen = choose_form(side, side, select_device(arguments.device))
        for batch in positive_numbers(arguments.batch, "--batch"):
            for backward in (False, True):
                print(line(arguments, side, batch, backward, budget), f" eager takes {chosen}", flush=True)


if __name__ == "__main__":
    main()
