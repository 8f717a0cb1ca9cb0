"""Windowed attention: every form equals the definition, and the blocked one grows no faster than the grid."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ssdd_models.attention import BLOCK, RADIUS, Form, choose_form, cut, make_layout, relative_bias, windowed_attention
from tests.reference import GOLDEN, fill

CPU = torch.device("cpu")
GRIDS = [(8, 8), (3, 5), (12, 40), (23, 24), (32, 32), (33, 29), (9, 64)]


def offsets(size: int) -> Tensor:
    return torch.arange(size)[:, None] - torch.arange(size)


def defined(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """The definition: a bias for every pair of positions."""
    bias = relative_bias(table, offsets(height), offsets(width))
    q, k, v = (x.unflatten(2, (table.shape[-1], -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def drawn(height: int, width: int, device: torch.device = CPU, dim: int = 32) -> list[Tensor]:
    torch.manual_seed(height * width)
    shapes = [(2, height * width, dim)] * 3 + [(15, 15, 2)]
    return [torch.randn(shape, device=device).requires_grad_() for shape in shapes]


def test_relative_bias_equals_the_golden_values() -> None:
    table, units = fill("unit.relative_bias_table", (15, 15, 2)), np.load(GOLDEN / "units.npz")
    for grid in (8, 12):
        bias = relative_bias(table, offsets(grid), offsets(grid))
        torch.testing.assert_close(bias, torch.from_numpy(units[f"relbias_grid{grid}"]))


@pytest.mark.parametrize("form", ["dense", "blocked"])
@pytest.mark.parametrize("grid", GRIDS)
def test_forms_and_their_gradients_equal_the_definition(grid: tuple[int, int], form: Form) -> None:
    given = drawn(*grid)
    expected = defined(*given, *grid)
    layout = make_layout(*grid, CPU, form)
    ours = windowed_attention(*given, layout)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with torch.no_grad():  # another kernel
        torch.testing.assert_close(windowed_attention(*given, layout), expected, rtol=0, atol=1e-5)
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(ours, given, weight), torch.autograd.grad(expected, given, weight), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1, other.abs().max().item()))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grid", [(8, 8), (12, 40), (23, 24), (33, 29)])
@torch.no_grad()
def test_flex_attention_equals_the_definition(grid: tuple[int, int]) -> None:
    given = drawn(*grid)
    ours = windowed_attention(*given, make_layout(*grid, CPU, "flex"))
    torch.testing.assert_close(ours, defined(*given, *grid), rtol=0, atol=1e-5)


@pytest.mark.compiled
@pytest.mark.parametrize("width", [24, 36, 48, 64, 72])  # of a head: those of XS, ..., and no power of two
@torch.no_grad()  # FlexAttention has no backward on a CPU
def test_compiled_flex_attention_equals_the_definition(width: int) -> None:
    given = drawn(23, 24, dim=2 * width)
    compiled = torch.compile(windowed_attention, dynamic=False, fullgraph=True)
    ours = compiled(*given, make_layout(23, 24, CPU, "flex"))
    torch.testing.assert_close(ours, defined(*given, 23, 24), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [48, 80, 128])
@pytest.mark.parametrize("form", ["dense", "blocked", "flex"])
def test_forms_on_cuda_and_their_gradients_equal_the_definition(dim: int, form: Form) -> None:
    device = torch.device("cuda")
    given = drawn(33, 40, device, dim)
    attention = torch.compile(windowed_attention, dynamic=False) if form == "flex" else windowed_attention
    ours = attention(*given, make_layout(33, 40, device, form))
    cpu = [x.detach().cpu().requires_grad_() for x in given]
    expected = defined(*cpu, 33, 40)
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-4)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad(ours, given, weight.to(device)), torch.autograd.grad(expected, cpu, weight)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("grid", "device", "form"),
    [((16, 16), "cpu", "blocked"), ((32, 32), "cuda", "dense"), ((33, 16), "cuda", "blocked"),
     ((128, 128), "cuda", "blocked")],
)  # fmt: skip
def test_no_form_needs_a_compiler_where_there_is_none(grid: tuple[int, int], device: str, form: Form) -> None:
    assert choose_form(*grid, torch.device(device)) == form


def test_every_window_lies_in_its_region_and_every_query_in_a_block() -> None:
    for size in range(1, 150):
        axis = cut(size)
        seen = set()
        for run in axis.runs:
            for start in axis.starts(run, CPU).tolist():
                first = start - run.offset
                assert first >= 0
                assert first + axis.region <= size
                for query in range(start, start + axis.block):
                    assert max(query - RADIUS, 0) >= first
                    assert min(query + RADIUS, size - 1) < first + axis.region
                    seen.add(query)
        assert seen == set(range(size))


@pytest.mark.parametrize("grid", [(64, 64), (128, 128), (16, 512)])
def test_pairs_computed_per_position_are_bounded(grid: tuple[int, int]) -> None:
    layout = make_layout(*grid, CPU, "blocked")
    pairs = sum(len(piece.queries) * len(piece.keys) // piece.num for piece in layout.pieces)
    assert pairs <= grid[0] * grid[1] * (BLOCK + 2 * RADIUS) ** 2


def test_half_precision_cannot_overflow_the_mask() -> None:
    given = [x.detach().to(torch.bfloat16) for x in drawn(24, 24)[:3]]
    table = drawn(24, 24)[3].detach()
    assert windowed_attention(*given, table, make_layout(24, 24, CPU)).isfinite().all()
