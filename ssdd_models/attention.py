"""Self-attention on a grid, limited to a 15 x 15 window, with a learned bias per offset: exact, and linear in the grid.

Three forms of the same sum. `blocked`: queries are taken in square blocks, each with the keys its windows can reach,
at most 22 x 22 positions, so that time and memory per position are bounded. `dense`: the grid is one block, with a bias
for every pair. `flex`: a FlexAttention, which wants torch.compile. `choose_form` says which is used where.
The bias is looked up from the table in every call; a cached one would be frozen while the table is trained.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS = 7  # a query sees keys up to this many rows and columns away
SIDE = 2 * RADIUS + 1
BLOCK = 8  # queries are taken in blocks of at most 8 x 8
MASKED = -1e7
Form = Literal["dense", "blocked", "flex"]


def choose_form(height: int, width: int, device: torch.device) -> Form:
    """The fastest form by the table of `python -m tests.bench_attention`.

    For CUDA by arithmetic so far: up to 32 x 32 tokens (256 px) one kernel over all pairs costs less than gathering
    blocks; FlexAttention saves nothing below 64 x 64, and without a compiler it would build all pairs.
    """
    if device.type != "cuda":
        return "blocked"
    if max(height, width) <= 32:
        return "dense"
    return "flex" if height * width > 64 * 64 and torch.compiler.is_compiling() else "blocked"


@dataclass(frozen=True)
class Run:
    """Neighbouring blocks along one axis whose queries lie alike in their region of keys."""

    first: int  # index of the first block
    count: int
    offset: int  # first query minus first key of each block


@dataclass(frozen=True)
class Axis:
    """How one side of the grid is cut: blocks of `block` queries (the last may overlap), `region` keys each."""

    size: int
    block: int
    region: int
    runs: tuple[Run, ...]

    def starts(self, run: Run, device: torch.device) -> Tensor:
        """First query of each block of a run: int64 [count]"""
        blocks = torch.arange(run.first, run.first + run.count, device=device)
        return (blocks * self.block).clamp(max=self.size - self.block)


def cut(size: int, whole: int = BLOCK + 2 * RADIUS) -> Axis:
    """Cut an axis; up to `whole` positions stay in one piece."""
    if size <= whole:
        return Axis(size, size, size, (Run(0, 1, 0),))
    # Blocks as equal as can be, so that only the last overlaps its neighbour, and by less than there are blocks.
    block = -(-size // -(-size // BLOCK))
    region = block + 2 * RADIUS
    runs: list[Run] = []
    for i in range(-(-size // block)):
        start = min(i * block, size - block)
        # At the borders the region is shifted inside instead of cut, so that all blocks have keys of one shape.
        offset = start - min(max(start - RADIUS, 0), size - region)
        if runs and runs[-1].offset == offset:
            runs[-1] = Run(runs[-1].first, runs[-1].count + 1, offset)
        else:
            runs.append(Run(i, 1, offset))
    return Axis(size, block, region, tuple(runs))


def table_index(difference: Tensor) -> Tensor:
    """Differences of coordinates, query minus key -> rows or columns of the table; outside the window the sixteenth."""
    return torch.where(difference.abs() <= RADIUS, difference + RADIUS, SIDE)


def relative_bias(table: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bias of every query and key: table [15, 15, heads] at (query - key), -1e7 outside the window.

    rows int64 [Qr, Kr] and columns [Qc, Kc] hold what `table_index` gives -> [heads, Qr * Qc, Kr * Kc]
    """
    # Two lookups of one axis each cost less than a joint one. float16 cannot hold -1e7.
    outside = max(MASKED, torch.finfo(dtype).min / 2)
    padded = F.pad(table.permute(2, 0, 1), (0, 1, 0, 1), value=outside)  # [heads, 16, 16]
    if not torch.is_grad_enabled():  # gradients of many pairs are added up in float32
        padded = padded.to(dtype)
    bias = padded.index_select(2, columns.flatten()).index_select(1, rows.flatten())  # [heads, Qr * Kr, Qc * Kc]
    return bias.view(-1, *rows.shape, *columns.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2).to(dtype)


def indices(axis: Axis, run: Run, device: torch.device) -> Tensor:
    """`table_index` of queries and keys along an axis for the blocks of a run: int64 [block, region]"""
    queries, keys = (torch.arange(n, device=device) for n in (axis.block, axis.region))
    return table_index(run.offset + queries[:, None] - keys)


@dataclass(frozen=True)
class Piece:
    """Blocks that share one bias: their tokens in the flattened grid and where in the table it is found."""

    queries: Tensor  # int64 [num * block positions]
    keys: Tensor  # int64 [num * region positions]
    num: int
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Layout:
    """How a grid of `height` x `width` tokens is cut; made once per forward pass, shared by all layers."""

    height: int
    width: int
    pieces: tuple[Piece, ...]
    inverse: Tensor  # int64 [N]: where each token's result lies among the results of all pieces
    flex: Any = None  # what flex_layout returns, for the FlexAttention form


def tokens(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Flattened positions of blocks: rows [I, r], columns [J, c] -> int64 [I * J * r * c], block after block"""
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten()


def make_layout(height: int, width: int, device: torch.device, form: Form | None = None) -> Layout:
    """Cut a grid for a form; None: the one that `choose_form` says."""
    form = form or choose_form(height, width, device)
    if form == "flex":
        return Layout(height, width, (), torch.empty(0), flex_layout(height, width, device))
    vertical, horizontal = (cut(size, size) if form == "dense" else cut(size) for size in (height, width))
    pieces, order = [], []
    for down in vertical.runs:
        for right in horizontal.runs:
            queries, keys = [], []
            for axis, run in ((vertical, down), (horizontal, right)):
                start = axis.starts(run, device)[:, None]
                queries.append(start + torch.arange(axis.block, device=device))
                keys.append(start - run.offset + torch.arange(axis.region, device=device))
            piece = Piece(
                tokens(queries[0], queries[1], width),
                tokens(keys[0], keys[1], width),
                down.count * right.count,
                indices(vertical, down, device),
                indices(horizontal, right, device),
            )
            pieces.append(piece)
            order.append(piece.queries)
    results = torch.cat(order)
    inverse = torch.empty(height * width, dtype=torch.int64, device=device)
    inverse[results] = torch.arange(
        len(results), device=device
    )  # tokens in two blocks have equal results: either will do
    return Layout(height, width, tuple(pieces), inverse)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout) -> Tensor:
    """q, k, v [B, N, heads * d] on a flattened grid, table [15, 15, heads] -> [B, N, heads * d]"""
    heads = table.shape[-1]
    if layout.flex is not None:
        return flex_attention(q, k, v, table, layout)
    if len(layout.pieces) == 1:  # a small grid is its own block: nothing to gather
        piece = layout.pieces[0]
        return attend(q, k, v, relative_bias(table, piece.rows, piece.columns, q.dtype), heads, len(q))
    results = []
    for piece in layout.pieces:
        bias = relative_bias(table, piece.rows, piece.columns, q.dtype)
        queries, keys, values = (
            x.index_select(1, i) for x, i in ((q, piece.queries), (k, piece.keys), (v, piece.keys))
        )
        h = attend(queries, keys, values, bias, heads, len(q) * piece.num)
        results.append(h.reshape(len(q), -1, q.shape[-1]))
    return torch.cat(results, dim=1).index_select(1, layout.inverse)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, heads: int, batch: int) -> Tensor:
    """Plain attention in `batch` equal groups of positions; bias [heads, Q, K], shared by the groups."""
    d = q.shape[-1] // heads
    q, k, v = (x.reshape(batch, -1, heads, d).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2).flatten(2)


TILE = (8, 16)  # 128 positions, one block of the kernel; a window reaches into the neighbouring tiles and no farther


def tile_position(place: Tensor, across: int) -> tuple[Tensor, Tensor]:
    """(row, column) of a place in the order by tiles, `across` of them side by side."""
    tile, inner = place // 128, place % 128
    return tile // across * TILE[0] + inner // TILE[1], tile % across * TILE[1] + inner % TILE[1]


def flex_layout(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Any, int]:
    """Token order by tiles, its inverse, the block mask, and the number of tiles side by side."""
    from torch.nn.attention.flex_attention import BlockMask

    down, across = -(-height // TILE[0]), -(-width // TILE[1])
    # Positions beyond the grid repeat its last row or column; as keys they are masked, as queries dropped by `inverse`.
    row, column = tile_position(torch.arange(down * across * 128, device=device), across)
    order = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
    y, x = (torch.arange(n, device=device) for n in (height, width))
    tiles = (y // TILE[0] * across)[:, None] + x // TILE[1]
    inverse = (tiles * 128 + (y % TILE[0] * TILE[1])[:, None] + x % TILE[1]).flatten()

    def inside(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (y, x), (key_y, key_x) = tile_position(query, across), tile_position(key, across)
        window = ((y - key_y).abs() <= RADIUS) & ((x - key_x).abs() <= RADIUS)
        return window & (key_y < height) & (key_x < width)

    t = torch.arange(down * across, device=device)
    near = ((t[:, None] // across - t // across).abs() <= 1) & ((t[:, None] % across - t % across).abs() <= 1)
    number = near.sum(dim=1, dtype=torch.int32)[None, None]
    which = near.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)[None, None]
    return order, inverse, BlockMask.from_kv_blocks(number, which, BLOCK_SIZE=128, mask_mod=inside), across


def flex_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout) -> Tensor:
    """The FlexAttention form of `windowed_attention`, to be called under torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention as kernel

    order, inverse, mask, across = layout.flex
    heads = table.shape[-1]
    q, k, v = (x.index_select(1, order).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))

    def biased(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (y, x), (key_y, key_x) = tile_position(query, across), tile_position(key, across)
        down, right = ((d + RADIUS).clamp(0, SIDE - 1) for d in (y - key_y, x - key_x))
        return score + table[down, right, head]

    # The bias is loaded tile by tile with K and V: a pipeline of several tiles exceeds the shared memory of most cards.
    options: Any = {"num_stages": 1} if q.device.type == "cuda" else None
    h = kernel(
        q.contiguous(), k.contiguous(), v.contiguous(), score_mod=biased, block_mask=mask, kernel_options=options
    )
    return h.transpose(1, 2).flatten(2).index_select(1, inverse)
